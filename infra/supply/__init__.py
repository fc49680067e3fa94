"""What is installed and where it comes from: locks with hashes, their audit, and the digests of images."""
