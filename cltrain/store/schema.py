"""The tables. Rows in records, named_records, record_faults, earlier_tools, generations and feedback are written by
gateways (and import) only; updates, reads, verdicts, releases, audits and probes by the worker only; screenings by the
worker, by `registry.aliases` and `quarantine`; aliases by `registry.aliases` only; rollouts by `registry.rollouts`
only; replicas by `deploy.replicas` only; decisions are append-only.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()

records = Table(
    "records",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String, nullable=False, unique=True),  # x-cltrain-trajectory, or the importer's id
    Column("agent", String, nullable=False),
    Column("session", String, nullable=False),
    Column("principal", String, nullable=False),
    Column("split", String, nullable=False),  # train | eval, by HMAC of the deployment secret over the session
    Column("release", String),  # the release this episode is pinned to
    Column("status", String, nullable=False),  # open | ended
    Column("is_mixed", Boolean, nullable=False, default=False),
    Column("end", String, nullable=False, default="ok"),
    Column("prefix", String),  # sha256 of the canonical messages so far: continuation by exact prefix
    Column("payload", JSON, nullable=False),  # {"messages": [...], "producers": [...], "tools": [...]}
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    sqlite_autoincrement=True,
)
Index("records_by_agent", records.c.agent, records.c.status, records.c.seq)
Index("records_by_session", records.c.agent, records.c.session, records.c.seq)
Index("records_by_prefix", records.c.agent, records.c.prefix)

named_records = Table(  # whose client asked for a release by its name: none of these is an arm's in a rollout
    "named_records",
    metadata,
    Column("record", String, primary_key=True),
)

record_faults = Table(  # records with a broken answer, or one that never came: the first, whatever came after it
    "record_faults",
    metadata,
    Column("record", String, primary_key=True),
    Column("reason", Text, nullable=False),
)

earlier_tools = Table(  # what a record's answers before that message were offered, where later ones got other tools
    "earlier_tools",
    metadata,
    Column("record", String, primary_key=True),
    Column("before", Integer, primary_key=True),
    Column("tools", JSON, nullable=False),
)

generations = Table(
    "generations",
    metadata,
    Column("id", String, primary_key=True),  # x-cltrain-record
    Column("record", String, nullable=False, index=True),
    Column("turn", Integer, nullable=False),
    Column("release", String, nullable=False),
    Column("prompt_ids", JSON),
    Column("completion_ids", JSON),
    Column("logprobs", JSON),
    Column("finish_reason", String),
    Column("created_at", Float, nullable=False),
)

feedback = Table(
    "feedback",
    metadata,
    Column("id", String, primary_key=True),
    Column("agent", String, nullable=False),
    Column("target", String, nullable=False, index=True),  # a generation's or a record's id
    Column("record", String, index=True),  # the record it belongs to, resolved when it came in
    Column("score", Float),
    Column("text", Text),
    Column("correction", JSON),
    Column("source", String, nullable=False),
    Column("principal", String),
    Column("created_at", Float, nullable=False),
)

set_aside = Table(  # import lines that could not become records: counted, kept, explained
    "set_aside",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("source", String, nullable=False),
    Column("line", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    Column("raw", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("source", "line"),
)

screenings = Table(  # what the worker thinks of a record; the newest row per record counts
    "screenings",
    metadata,
    Column("record", String, primary_key=True),
    Column("agent", String, nullable=False, index=True),
    Column("status", String, nullable=False),  # waiting | learned | replay | quarantined | unusable
    Column("reason", Text),
    Column("stratum", String),
    Column("update", String),
    Column("changed_at", Float, nullable=False),
)

updates = Table(
    "updates",
    metadata,
    Column("id", String, primary_key=True),
    Column("agent", String, nullable=False, index=True),
    Column("number", Integer, nullable=False),
    Column("state", String, nullable=False),  # training | judging | done | discarded
    Column("parent", String, nullable=False),
    Column("candidate", String),
    Column("verdict", String),
    Column("mode", String, nullable=False),  # off never runs; trial judges and throws away
    Column("fence", Integer, nullable=False),
    Column("manifest", JSON, nullable=False),  # config digest, seed, window, base, request, ...
    Column("summary", JSON),  # bounds, metrics, decision: what the report shows
    Column("started_at", Float, nullable=False),
    Column("finished_at", Float),
    UniqueConstraint("agent", "number"),
)

update_progress = Table(  # what a restart must know of an update that is not concluded yet
    "update_progress",
    metadata,
    Column("update", String, primary_key=True),
    Column("num_starts", Integer, nullable=False),  # this one and those that ended with their process
    Column("rejection", JSON),  # the first attempt's decision, from before a second attempt begins
)

update_reads = Table(
    "update_reads",
    metadata,
    Column("update", String, primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("slot", Integer, primary_key=True),
    Column("record", String, nullable=False, index=True),
)

releases = Table(
    "releases",
    metadata,
    Column("name", String, primary_key=True),
    Column("agent", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", String, nullable=False),
    Column("parent", String),
    Column("path", Text),  # relative to the state directory; None for the bare base
    Column("status", String, nullable=False),
    Column("manifest", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
)
Index("releases_by_agent", releases.c.agent, releases.c.number)

aliases = Table(
    "aliases",
    metadata,
    Column("agent", String, primary_key=True),
    Column("release", String, nullable=False),
    Column("previous", String),
    Column("anchor", String, nullable=False),  # the last human-approved release
    Column("high_water", String, nullable=False),  # moves only on significant improvement
    Column("version", Integer, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("changed_at", Float, nullable=False),
)

agents = Table(  # learning switch and lease
    "agents",
    metadata,
    Column("agent", String, primary_key=True),
    Column("is_frozen", Boolean, nullable=False, default=False),
    Column("frozen_reason", Text),
    Column("fence", Integer, nullable=False, default=0),  # grows at every new lease
    Column("lease_holder", String),
    Column("lease_until", Float),
)

workers = Table(  # what the newest holder of an agent's lease learns with
    "workers",
    metadata,
    Column("agent", String, primary_key=True),
    Column("settings", JSON, nullable=False),  # see Config.shaping
)

rollouts = Table(  # candidates tried on live traffic; one open per agent, see registry/rollouts.py
    "rollouts",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("agent", String, nullable=False, index=True),
    Column("kind", String, nullable=False),  # canary | shadow
    Column("incumbent", String, nullable=False),
    Column("release", String, nullable=False),
    Column("update", String, nullable=False),
    Column("alias_version", Integer, nullable=False),  # as it stood then: the promotion compares it
    Column("raises_high_water", Boolean, nullable=False),
    Column("settings", JSON, nullable=False),  # RolloutConfig, fixed before the first answer
    Column("step", Integer, nullable=False),  # of settings.weights
    Column("weight", Float, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("state", String, nullable=False),  # open | promoted | back
    Column("reason", Text),
    Column("evidence", JSON, nullable=False),  # what the last look found: see cltrain/rollout.py
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float),
    sqlite_autoincrement=True,
)

rollout_outcomes = (
    Table(  # in the order in which they are judged; of a canary by the worker, of a shadow by the gateway
        "rollout_outcomes",
        metadata,
        Column("id", Integer, primary_key=True, autoincrement=True),
        Column("rollout", Integer, nullable=False),
        Column("unit", String, nullable=False),  # the episode's record, or the generation whose request was copied
        Column("arm", String, nullable=False),  # incumbent | candidate
        Column("fault", Boolean, nullable=False),
        Column("score", Float),  # None: nobody who may judge said anything
        UniqueConstraint("rollout", "unit", "arm"),
        sqlite_autoincrement=True,
    )
)

requests = Table(  # asked of the running worker by CLI and API; the worker alone answers
    "requests",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("agent", String, nullable=False, index=True),
    Column("kind", String, nullable=False),  # update | trial | share | audit
    Column("options", JSON, nullable=False),
    Column("outcome", JSON),  # None until done
    Column("created_at", Float, nullable=False),
    sqlite_autoincrement=True,
)

item_scores = Table(  # cached by release and item: incumbent, anchor and base are never scored twice
    "item_scores",
    metadata,
    Column("release", String, primary_key=True),
    Column("item", String, primary_key=True),
    Column("score", Float, nullable=False),
)

answer_cuts = Table(  # beside the scores: whether the answer ended because it was too long
    "answer_cuts",
    metadata,
    Column("release", String, primary_key=True),
    Column("item", String, primary_key=True),
    Column("is_cut", Boolean, nullable=False),
)

judge_scores = Table(  # what a judge said of an answer, by a hash of everything that it was shown
    "judge_scores",
    metadata,
    Column("content", String, primary_key=True),
    Column("score", Float, nullable=False),
)

item_uses = Table(
    "item_uses",
    metadata,
    Column("agent", String, primary_key=True),
    Column("item", String, primary_key=True),
    Column("uses", Integer, nullable=False),
)

audits = Table(  # what was found when what serves was looked at; no update has a part in it
    "audits",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("agent", String, nullable=False, index=True),
    Column("release", String, nullable=False),  # what served then
    Column("trigger", String, nullable=False),  # asked | timer | move
    Column("outcome", String, nullable=False),  # ok | warning | alarm | error
    Column("summary", JSON, nullable=False),  # reasons, codes, checks, scores, action
    Column("started_at", Float, nullable=False),
    Column("finished_at", Float, nullable=False),
    sqlite_autoincrement=True,
)

vault_openings = Table(  # when the sealed items were asked, and the one bit that came out
    "vault_openings",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("agent", String, nullable=False, index=True),
    Column("release", String, nullable=False),
    Column("at", Float, nullable=False),
    Column("has_lost", Boolean),  # None: the answer never came
    sqlite_autoincrement=True,
)

replicas = Table(
    "replicas",
    metadata,
    Column("url", String, primary_key=True),
    Column("release", String, primary_key=True),  # "": the server itself, up or out
    Column("root", Text),
    Column("state", String, nullable=False),  # loading | loaded | proved | failed | draining | out (see readiness.py)
    Column("seen_at", Float, nullable=False),  # when it became so; of proved: when it was last shown
)

probes = Table(  # what proves that a server answers with a release; see deploy/probes.py
    "probes",
    metadata,
    Column("release", String, primary_key=True),
    Column("content", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
)

decisions = Table(
    "decisions",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("agent", String, nullable=False, index=True),
    Column("kind", String, nullable=False),  # verdict | promote | rollback | freeze | unfreeze | discard | audit | ...
    Column("payload", JSON, nullable=False),
    Column("at", Float, nullable=False),
    Column("previous_hash", String, nullable=False),
    Column("hash", String, nullable=False, unique=True),
    sqlite_autoincrement=True,
)

outbox = Table(
    "outbox",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("agent", String, nullable=False),
    Column("kind", String, nullable=False),  # update | swap | gauge
    Column("payload", JSON, nullable=False),
    Column("at", Float, nullable=False),
    sqlite_autoincrement=True,
)

sink_marks = Table(
    "sink_marks",
    metadata,
    Column("sink", String, primary_key=True),
    Column("seq", Integer, nullable=False),
)
