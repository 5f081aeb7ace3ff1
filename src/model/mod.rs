//! The model repository: folders, manifests, generations, the registry.
