"""scripts/plan.py writes a plan that generate.py runs; what a person can mend is one line."""

import json

import pytest


@pytest.mark.slow
def test_a_plan_for_generate(plan_command, generate, short_profile, checkpoint, tmp_path):
    prompts, plan = tmp_path / "p.txt", tmp_path / "plan.json"
    prompts.write_text("Call me\nIshmael\n")
    job = (f"--model={checkpoint}", f"--prompts={prompts}", "--max_new_tokens=6")
    ran = plan_command(*job, f"--output={plan}", "--link_gbps=0.001")
    assert ran.code == 0, ran.err
    told = " ".join(ran.err.split())
    assert "acceptance per token: self" in told and "predicted, bound by the" in told and "attend_paged" in told
    fields = json.loads(plan.read_text())
    assert fields["link_bytes_per_s"] == 1e6 and fields["expert_flow"] != "resident"
    ran = generate(*job, f"--plan={plan}", f"--stats={tmp_path / 's.json'}")
    assert ran.code == 0, ran.err
    stats = json.loads((tmp_path / "s.json").read_text())
    assert stats["plan"] == fields and stats["predicted"]["step_s"] > 0 and stats["fraction_of_floor"] > 0
    assert "step predicted / measured" in ran.err


@pytest.mark.slow
def test_refusals(run_script, checkpoint):
    ran = run_script("plan.py", f"--model={checkpoint}/none")
    assert ran.code == 1 and ran.err.count("\n") == 1
    assert run_script("plan.py", "--model=demo", "--nonsense").code == 2


@pytest.mark.slow
def test_the_prompts_are_not_overwritten(run_script, tmp_path):
    (tmp_path / "p.txt").write_text("Call me\n")
    ran = run_script("plan.py", "--model=demo", f"--prompts={tmp_path / 'p.txt'}", f"--output={tmp_path / 'p.txt'}")
    assert ran.code == 1 and "--prompts and --output are both" in ran.err and (tmp_path / "p.txt").read_text() == "Call me\n"


@pytest.mark.slow
def test_a_plan_for_another_machine(run_script, tmp_path):
    """By its rates alone: nothing of this machine is measured."""
    ran = run_script("plan.py", "--model=demo", "--hardware=l4", "--host_memory_gib=32", f"--output={tmp_path / 'plan.json'}")
    assert ran.code == 0 and "L4 24 GB (data sheets" in ran.err and "attend_paged" not in ran.err, ran.err
    assert max(map(len, ran.err.splitlines())) <= 80
    assert json.loads((tmp_path / "plan.json").read_text())["expert_flow"] == "resident"
    assert run_script("plan.py", "--model=demo", "--hardware=l4", "--fresh").code == 2
