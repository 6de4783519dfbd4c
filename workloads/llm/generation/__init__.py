"""Text generation by the engine of the core, and by engines that people use, from the same weights."""
