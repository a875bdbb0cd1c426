"""The drafts: the protocol and one file per draft."""
