"""Other people's networks as denoisers: other predictions, published EDM pickles, Stable Diffusion."""
