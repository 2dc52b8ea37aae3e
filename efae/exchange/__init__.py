"""Models and tokenizers of other libraries, and ours for them."""
