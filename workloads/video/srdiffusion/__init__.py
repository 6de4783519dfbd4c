"""SRDiffusion: a large model sketches the high-noise steps of a video, a small one renders the rest."""
