"""Where the bytes of a checkpoint come from: folders, web servers, the Hugging Face Hub, S3, other nodes."""
