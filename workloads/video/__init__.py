"""Text-to-video diffusion on diffusers models: one denoise loop that systems plug into as policies."""
