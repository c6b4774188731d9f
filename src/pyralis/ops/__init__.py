"""One operation per file: public function, autograd, Triton kernel, readable reference, `supported()`."""
