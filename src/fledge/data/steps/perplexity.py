"""How well a reference corpus foretells a text: documents sorted by perplexity, as CCNet does."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pydantic import Field, PrivateAttr

from fledge.core.artifact import NGram
from fledge.core.reference import Ref
from fledge.data.chunk import Chunk
from fledge.data.steps.base import CorpusStep, Find, Refused, Rejected, Sketches

if TYPE_CHECKING:
    import pyarrow as pa

    from fledge.data.judges.ngram_model import NGramModel

BUCKETS = ("head", "middle", "tail")


class Perplexity(CorpusStep, name="perplexity"):
    """Perplexity a unit under an n-gram model of reference text (CCNet, Wenzek et al., 2020), into `meta.perplexity`;
    `meta.perplexity_bucket` says in which third of the corpus's texts of its language a text lies: head (the most
    like the reference), middle or tail. A text is refused above `max`, or above a percentile of its language."""

    model: Ref[NGram] = Field(description="the n-gram model, as `ngram.train` makes it")
    max: dict[str, float] = Field(
        default_factory=dict, description="{language: largest perplexity}: en, zh; others are not judged"
    )
    percentile: float | None = Field(
        None, gt=0, le=100, description="refuse what lies above this percentile of the corpus's texts of its language"
    )
    bucket: bool = Field(True, description="write head, middle or tail into meta")
    _model: NGramModel | None = PrivateAttr(None)

    def start(self, find: Find) -> None:
        from fledge.data.judges.ngram_model import NGramModel

        (folder,) = find(self.model)
        self._model = NGramModel.load(folder)

    def sketch(self, chunk: Chunk) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        from fledge.data.ngrams import unit_hashes
        from fledge.data.texts import units

        assert self._model is not None
        if self._model.notes.unit == "words":
            sequences = [unit_hashes(words) for words in chunk.of_each(units)]
        else:
            sequences = self._model.segment(chunk.texts)
        sums, sizes = self._model.scores(sequences)
        return pa.table(
            {
                "row": pa.array(range(len(chunk)), pa.int64()),
                "language": pa.array(chunk.languages, pa.string()),
                "perplexity": pa.array(np.exp(-sums / np.maximum(sizes, 1)), pa.float64()),
            }
        )

    def decide(self, sketches: Sketches, earlier: list[Sketches]) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        columns = pa.schema([("row", pa.int64()), ("language", pa.string()), ("perplexity", pa.float64())])
        corpus = pa.concat_tables([columns.empty_table(), *sketches.tables(columns.names)])
        values = corpus["perplexity"].to_numpy()
        coded = corpus["language"].combine_chunks().dictionary_encode()
        codes, names = coded.indices.to_numpy(), coded.dictionary.to_pylist()
        third, most = np.zeros(len(values), dtype=np.int64), np.full(len(values), np.inf)
        for code, name in enumerate(names):
            mine = codes == code
            third[mine] = np.searchsorted(np.quantile(values[mine], [1 / 3, 2 / 3]), values[mine])
            limits = [self.max[name]] if name in self.max else []
            limits += [float(np.percentile(values[mine], self.percentile))] if self.percentile is not None else []
            most[mine] = min(limits, default=np.inf)
        return pa.table(
            {
                "row": corpus["row"],
                "perplexity": corpus["perplexity"],
                "bucket": pa.array([BUCKETS[i] for i in third.tolist()], pa.string()),
                "refused": pa.array(values > most, pa.bool_()),
            }
        )

    def apply(self, chunk: Chunk, verdicts: pa.Table, counts: Counter[str]) -> tuple[Chunk, Refused]:
        values = [f"{value:.1f}" for value in verdicts["perplexity"].to_pylist()]
        chunk = chunk.with_meta("perplexity", values)
        if self.bucket:
            chunk = chunk.with_meta("perplexity_bucket", verdicts["bucket"].to_pylist())
        refused = verdicts["refused"].to_pylist()
        return chunk, {row: Rejected("perplexity", values[row]) for row in range(len(chunk)) if refused[row]}
