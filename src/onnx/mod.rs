//! The ONNX file format and the graph in it.
