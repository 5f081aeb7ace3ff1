//! What the `ort` crate does not offer safely: the version of a library before it is used, and tensors over bytes that somebody
//! else keeps (mapped weights, shared memory).
//!
//! The one place of this module tree with `unsafe`.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, c_char, c_void},
    path::Path,
    ptr::{self, NonNull},
};

use bytes::Bytes;
use libloading::os::unix::{Library, RTLD_LAZY, RTLD_LOCAL};
use ort::{
    AsPointer as _,
    memory::{Allocator, MemoryInfo},
    value::DynValue,
};

use super::value;
use crate::tensor::DType;

/// The version that a library says it has. The library stays loaded.
///
/// # Errors
/// When it cannot be loaded, or is no ONNX Runtime.
pub(super) fn library_version(path: &Path) -> Result<String, String> {
    // SAFETY: loading runs the library's initialisers. The path is absolute and comes from the operator or from our own
    // search, never from a model or a request.
    let library =
        unsafe { Library::open(Some(path), RTLD_LAZY | RTLD_LOCAL) }.map_err(|e| e.to_string())?;
    // SAFETY: every ONNX Runtime since 1.0 exports this function with this signature.
    let base = unsafe {
        library.get::<unsafe extern "C" fn() -> *const ort::sys::OrtApiBase>(b"OrtGetApiBase\0")
    }
    .map_err(|_| "it is not ONNX Runtime: it has no \"OrtGetApiBase\"".to_owned())?;
    // SAFETY: the function takes nothing and returns a static struct, or null.
    let base = unsafe { base().as_ref() }.ok_or("it gives no API")?;
    // SAFETY: the string is static and ends in a zero.
    let version: *const c_char = unsafe { (base.GetVersionString)() };
    if version.is_null() {
        return Err("it names no version".to_owned());
    }
    // SAFETY: as above.
    let version = unsafe { CStr::from_ptr(version) }
        .to_string_lossy()
        .into_owned();
    std::mem::forget(library); // pointers into it live on in `ort`
    Ok(version)
}

/// Lets a fault end the process by its signal. Rust's own handler, which tells stack overflows, otherwise swallows the first SIGSEGV or SIGBUS that
/// another process sends, and the front could not tell how its worker died.
pub(super) fn die_by_signals() {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: the default disposition runs no code of ours. Called before any other thread is started.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Gives the memory of mapped file pages back to the system; they are read again from the file when somebody looks.
///
/// `bytes` must be part of a mapped file, as a weight with an origin is: other memory would come back as zeros.
pub(super) fn give_pages_back(bytes: &[u8]) {
    let page = rustix::param::page_size();
    let skip = bytes.as_ptr().align_offset(page);
    let whole = bytes.len().saturating_sub(skip) / page * page;
    if whole == 0 {
        return;
    }
    let start = bytes[skip..].as_ptr().cast_mut().cast::<c_void>();
    // SAFETY: the range is inside `bytes`. The mapping is private, read-only and never written, so dropping its pages loses nothing.
    // Failing is harmless: the pages then stay.
    let _ = unsafe { rustix::mm::madvise(start, whole, rustix::mm::Advice::LinuxDontNeed) };
}

/// A tensor that ONNX Runtime reads in place.
///
/// Fields drop in order: the handle, then the bytes behind it. Who hands [`Lent::value`] to a session must keep the
/// `Lent` for as long as the session lives.
#[derive(Debug)]
pub(super) struct Lent {
    value: std::sync::Arc<DynValue>,
    _bytes: Bytes,
}

impl Lent {
    /// A tensor over these bytes.
    ///
    /// # Errors
    /// When the bytes do not fit the shape or are not aligned for the dtype; the caller then copies them.
    pub(super) fn new(dtype: DType, shape: &[usize], bytes: Bytes) -> Result<Self, ort::Error> {
        if dtype == DType::Bool && bytes.iter().any(|b| *b > 1) {
            return Err(invalid("a bool is neither 0 nor 1"));
        }
        // SAFETY: the bytes stay in place: `Bytes` never moves what it owns, and this value keeps it. ONNX Runtime only reads
        // weights and inputs; a write would fault on the read-only mapping.
        let value = unsafe { over(dtype, shape, bytes.as_ptr().cast_mut(), bytes.len()) }?;
        Ok(Self {
            value: std::sync::Arc::new(value),
            _bytes: bytes,
        })
    }

    /// The tensor.
    pub(super) fn value(&self) -> &std::sync::Arc<DynValue> {
        &self.value
    }
}

/// A tensor that ONNX Runtime writes in place, to be bound to an output.
///
/// Who binds it must leave `room` alone until the binding and the outputs of the run are gone.
///
/// # Errors
/// When the room does not fit the shape or is not aligned for the dtype.
pub(super) fn landing(dtype: DType, shape: &[usize], room: &mut [u8]) -> ort::Result<DynValue> {
    // SAFETY: the room is ours alone, by its borrow now and by the contract above for as long as the runtime may write.
    unsafe { over(dtype, shape, room.as_mut_ptr(), room.len()) }
}

/// A tensor over foreign memory.
///
/// # Safety
/// The memory must be there, and nobody else may write it, for as long as the tensor is used.
unsafe fn over(
    dtype: DType,
    shape: &[usize],
    data: *mut u8,
    bytes: usize,
) -> ort::Result<DynValue> {
    if crate::tensor::byte_len(dtype, shape) != bytes as u128 {
        return Err(invalid("the bytes do not fit the shape"));
    }
    if !data.addr().is_multiple_of(dtype.size()) {
        return Err(invalid("the bytes are not aligned"));
    }
    let dims: Vec<i64> = shape
        .iter()
        .map(|d| i64::try_from(*d))
        .collect::<Result<_, _>>()
        .map_err(|_| invalid("an extent is too large"))?;
    let memory = MemoryInfo::default();
    let mut out = ptr::null_mut();
    // SAFETY: the bytes are as long as the shape says and aligned (checked above); the caller keeps them in place.
    let status = unsafe {
        (ort::api().CreateTensorWithDataAsOrtValue)(
            memory.ptr(),
            data.cast::<c_void>(),
            bytes,
            dims.as_ptr(),
            dims.len(),
            value::element(dtype).into(),
            &raw mut out,
        )
    };
    // SAFETY: the status comes from the call above.
    unsafe { ort::Error::result_from_status(status) }?;
    let out = NonNull::new(out).ok_or_else(|| invalid("the runtime made no tensor"))?;
    // SAFETY: `out` is a new tensor of the CPU allocator that nobody else owns.
    Ok(unsafe { DynValue::from_ptr(out, Some(&Allocator::default())) })
}

fn invalid(why: &str) -> ort::Error {
    ort::Error::new_with_code(ort::ErrorCode::InvalidArgument, why)
}
