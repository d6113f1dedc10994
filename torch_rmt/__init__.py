"""torch_rmt: spectra of real networks beside the laws that random matrix theory predicts for them."""
