"""Memory-streamlined inference of video models: groups of operators in slices, reuse across steps, pipelines."""
