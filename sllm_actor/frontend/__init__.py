"""HTTP in, HTTP out: the OpenAI endpoint, the admin endpoint, and text to tokens and back."""
