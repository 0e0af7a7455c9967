"""Plans of every pipeline, drawn."""

from hypothesis import strategies as st
from pipeline_at_work import PIPELINES

from tangram.core.plan import Plan


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Return a plan for two to eight ranks that every pipeline takes."""
    pipeline = draw(st.sampled_from(list(PIPELINES.values())))
    ranks, groups = draw(st.sampled_from((2, 4, 6, 8))), draw(st.integers(2, 4))
    return pipeline.schedule(ranks, groups * ranks)
