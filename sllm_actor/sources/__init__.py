"""Where the bytes of a checkpoint come from: folders, web servers, the Hugging Face Hub."""
"""Where the bytes of a checkpoint come from: folders and S3."""
