"""`builtin:scenes`: captioned pictures that are drawn, not downloaded, and a reader that judges pictures by pixels."""
