"""`latent_attention`: keys and values of all heads become one rotary key and one latent, which alone are cached."""
