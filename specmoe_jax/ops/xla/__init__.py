"""What an accelerator runs, and a CPU where no compiled kernel fits: jnp, arranged for speed."""
