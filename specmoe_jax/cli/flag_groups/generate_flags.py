"""The flags of `generate` itself, beside those of groups that commands share."""

from absl import flags

from specmoe_jax.config.plan_fields import DTYPES
from specmoe_jax.config.presets import PRESETS
from specmoe_jax.support.progress import PROGRESS

MODEL = flags.DEFINE_string("model", "demo", '"demo" (bundled) or a directory with a Hugging Face checkpoint.')
PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
PROMPTS = flags.DEFINE_string(
    "prompts", None, "A file of prompts: .txt, one a line, .jsonl or .parquet; a dataset's folder; or - for standard input."
)
PROMPT_COLUMN = flags.DEFINE_string(
    "prompt_column", None, "The column of a table that holds the prompts; others but id are left out. Default: each is a field."
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Where finished requests go: JSON lines, or .parquet; the same command goes on after an interruption. Default: stdout.",
)
PRESET = flags.DEFINE_enum(
    "preset", None, ["auto", *PRESETS], "The plan; README.md says what each does. Default: auto, chosen for this machine and job."
)
PLAN = flags.DEFINE_string("plan", None, "A plan as JSON, instead of a preset.")
DRAFT_MODEL = flags.DEFINE_string("draft_model", None, "A checkpoint of the same vocabulary (draft=model).")
DRAFT_HEAD = flags.DEFINE_string("draft_head", None, "An EAGLE head (draft=eagle); default: the bundled model's own.")
DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Compute and weight type. Default float32, where exactness holds.")
CHAT = flags.DEFINE_boolean("chat", False, "Prompts are messages of a user, put through the model's chat template (needs jinja2).")
ADAPTER = flags.DEFINE_string("adapter", None, "A directory with a LoRA adapter (PEFT), merged into the model as it is loaded.")
STREAM = flags.DEFINE_boolean("stream", False, "Print text as it is committed.")
SHARD = flags.DEFINE_string(
    "shard",
    None,
    "The part i/n of the job that this run does, 1/n to n/n, into a file of its own; specmoe merge_outputs joins them.",
)
RESTART = flags.DEFINE_boolean("restart", False, "Begin the job of --output anew instead of going on with it.")
STATS = flags.DEFINE_string("stats", None, "Where the figures of the run go, as JSON.")
METRICS_FILE = flags.DEFINE_string("metrics_file", None, "Where the figures so far go each second, in Prometheus' text format.")
PROGRESS = flags.DEFINE_enum("progress", "auto", PROGRESS, "Bars on a terminal, a log line each 10 s, or nothing.")
TRACE = flags.DEFINE_string(
    "trace", None, "A folder for a profile of the generation (perfetto_trace.json.gz in it; lanes.json of a streamed plan)."
)
ROUTING_TRACES = flags.DEFINE_string(
    "routing_traces", None, "A folder for the experts that each token was sent to: NUMBER.npz for each request (docs/formats.md)."
)
ROUTING_WEIGHTS = flags.DEFINE_boolean("routing_weights", False, "With --routing_traces: the weights of the experts too.")
POPULARITY = flags.DEFINE_string(
    "popularity",
    None,
    "With --placement=popularity: what --routing_traces wrote, the folder or a file, or .npy of counts [layers, experts].",
)
