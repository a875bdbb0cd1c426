"""What runs on a CPU through the compiled module, which _ffi.py alone imports."""
