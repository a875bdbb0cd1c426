"""The SpecMoEOff suite on tiny sizes: every table runs, its figures agree with each other, and all are stamped."""

import pytest

from specmoe_jax.benchmarks import plots, specmoeoff
from specmoe_jax.benchmarks.rounds import Job
from specmoe_jax.testing import TINY, eagle_head
from tests.cli.benchmark_tables import check_table

LAYER = TINY.num_experts * TINY.expert_params * 4


@pytest.fixture(scope="module")
def setting(model):
    def job(batch, tokens):
        prompts = [tuple((7 * i + t) % 250 for t in range(min(tokens, 20))) for i in range(batch)]
        return Job(prompts=prompts, rounds=1, tokens=2)

    return specmoeoff.Setting(
        model=model,
        head=eagle_head(model),
        link_bytes_per_s=1e9,
        synthetic=True,
        length=2,
        batches=(4,),
        prompt=8,
        job=job,
        quick=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("table", specmoeoff.TABLES)
def test_every_table_runs_and_is_stamped(setting, table, tmp_path):
    rows = specmoeoff.TABLES[table](setting)
    check_table(rows)
    pytest.importorskip("matplotlib")
    written = plots.save({"suite": "specmoeoff", "model": "tiny", "tables": {table: rows}}, tmp_path)
    assert tmp_path / f"specmoeoff_tiny_{table}_speed.svg" in written
    assert all(1000 < path.stat().st_size < 60_000 for path in written)


def test_pinned_layers_take_memory_and_send_less(setting):
    rows = specmoeoff.device_memory(setting)
    none, one = rows["streaming @ 0 of 3 layers pinned"], rows["streaming @ 1 of 3 layers pinned"]
    assert one["peak_accelerator_bytes"] - none["peak_accelerator_bytes"] == LAYER
    assert one["link_bytes_per_step"] == pytest.approx(2 / 3 * none["link_bytes_per_step"], rel=0.3)


@pytest.mark.slow
def test_whole_jobs_count_prefill_and_every_token(setting):
    rows = specmoeoff.output_lengths(setting)
    for row in rows.values():
        assert 0 < row["job_tokens_per_s"] < row["decode_tokens_per_s"]
    assert {row["new_tokens"] for row in rows.values() if row["case"] == "streaming"} == {4 * 16, 4 * (TINY.max_positions - 8)}


def test_less_memory_for_the_drafts_cache_sends_more_rows_to_the_cpu(setting):
    rows = list(specmoeoff.draft_memory(setting).values())
    shares = [row["draft_cpu_row_share"] for row in rows]
    assert shares == sorted(shares) and shares[0] == 0 < shares[-1]
    assert len({(row["new_tokens"], tuple(row["acceptance_by_position"])) for row in rows}) == 1
    assert rows[-1]["peak_accelerator_bytes"] < rows[0]["peak_accelerator_bytes"]
