"""Profiles this machine and a model's operators, and writes the plan that is predicted to be the fastest.

Example:
    python scripts/plan.py --prompts=prompts.txt --requests=100 --output=plan.json
    python scripts/generate.py --prompts=prompts.txt --plan=plan.json
"""

from _run import run

if __name__ == "__main__":
    run("plan")
