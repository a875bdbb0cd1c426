"""python -m specmoe_jax COMMAND --flags: the same as specmoe COMMAND --flags."""

from specmoe_jax.cli.main import main

if __name__ == "__main__":
    main()
