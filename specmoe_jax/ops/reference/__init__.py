"""What every other implementation is checked against: jnp, as close to the definition as it can be written, and slow."""
