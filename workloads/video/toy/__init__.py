"""A tiny large/small pair of video models that any machine can run: how it is trained, and its weights."""
