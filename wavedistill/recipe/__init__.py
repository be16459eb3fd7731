"""The frozen, validated description of one experiment; nothing else reads TOML."""
