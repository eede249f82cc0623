"""Arrays of any kind as checked torch tensors; tensor files; tensors larger than memory."""
