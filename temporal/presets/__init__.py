"""The presets: one short TOML file per system."""
