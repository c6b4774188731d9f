"""What a decoder is: architectures, loading, and the seam where the fast path replaces stock modules."""
