"""What is to run: for any convolution on any GPU, who computes it and with which tiles, by model or by measurement."""
