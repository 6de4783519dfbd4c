"""PipeMax: batches rotate over pipeline stages, and the keys and values of those that wait give way to more of them."""
