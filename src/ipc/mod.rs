//! Frames and shared memory between the front and its workers, and the plain data that crosses.
