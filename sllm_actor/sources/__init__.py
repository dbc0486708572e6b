"""Where the bytes of a checkpoint come from. Local folders only, for now."""
