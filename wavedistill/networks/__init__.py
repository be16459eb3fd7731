"""The networks inside a flow."""
