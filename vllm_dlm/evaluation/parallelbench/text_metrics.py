# SPDX-License-Identifier: Apache-2.0
"""What is measured of free text, as ParallelBench measures it.

Grammar is the published score of all five tasks: 1 where LanguageTool finds nothing.
The others are published beside it. What another package computes is refused by name
where that package is not installed, before an engine starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any, TypeAlias

from vllm_dlm.evaluation.parallelbench.texts import TEXT_TASKS, Reference
from vllm_dlm.messages import quote

Measure: TypeAlias = Callable[[Sequence[str], Sequence[Reference]], list[float]]
"""From answers, and what they are compared with, to 0 to 1 for each."""

LANGUAGE = "en-US"
BLEU_ORDERS = 4
PROBE = "It is a good day."
"""Checked when a run begins, so that a LanguageTool that cannot is known then."""

METRICS = {
    "grammar": "1 where LanguageTool finds nothing: the published score",
    "inclusion": "1 where all words occur",
    "rouge1": "ROUGE-1 with the summary, F1 of stems",
    "rouge2": "ROUGE-2 with the summary, F1 of stems",
    "rougeL": "ROUGE-L with the summary, F1 of stems",
    "inverse_bleu": "1 - BLEU with the sentence that is paraphrased",
    "bertscore": "BERTScore with it: F1, of roberta-large",
    "product": "of grammar, and inclusion, rougeL, or inverse_bleu and bertscore",
}
DEFAULT = "grammar"
FACTORS = {
    "words_to_sentence": ("inclusion", "grammar"),
    "summarization": ("rougeL", "grammar"),
    "paraphrasing": ("inverse_bleu", "bertscore", "grammar"),
}
"""Beginning of a task's name -> what its `product` multiplies, as the paper does."""


def check_text_options(
    names: Sequence[str], metrics: Sequence[str] | None, language_tool: str | None
) -> None:
    """Refuse what none of a run's tasks would read.

    Args:
        names: of all tasks, groups expanded.
        metrics: as the user has named them; None if he has not.

    Raises:
        ValueError: it names the option, and what would be right.
    """
    texts = [
        member
        for family, _, member in (name.partition("/") for name in names)
        if family == "parallelbench" and member in TEXT_TASKS
    ]
    for option, value in (
        ("--text-metrics", metrics),
        ("--language-tool", language_tool),
    ):
        if value is not None and not texts:
            raise ValueError(
                f"{option} is for parallelbench/texts, or one of these tasks"
            )
    for metric in metrics or ():
        if metric not in METRICS:
            raise ValueError(
                f"--text-metrics: {quote(metric)} is none; choose of "
                f"{', '.join(METRICS)}"
            )
        if not any(metric in TEXT_TASKS[member].metrics for member in texts):
            having = [
                name for name, task in TEXT_TASKS.items() if metric in task.metrics
            ]
            raise ValueError(
                f"--text-metrics: {metric} is measured of {', '.join(having)}, and "
                "--tasks names none of them"
            )
    asked = {"grammar", "product"} & set(metrics or [DEFAULT])
    if language_tool is not None and not asked:
        raise ValueError(
            "--language-tool is for the metrics grammar and product: --text-metrics "
            "names neither"
        )


def measure_of(name: str, task: str, language_tool: str | None) -> Measure:
    """How a task's answers are measured.

    Args:
        name: of `METRICS`.
        task: one of the five, without `parallelbench/`.
        language_tool: address of a LanguageTool server; None starts one, with Java.

    Raises:
        ValueError: it needs a package or a program that is not here.
    """
    if name == "product":
        (factors,) = (FACTORS[kind] for kind in FACTORS if task.startswith(kind))
        return _product([measure_of(each, task, language_tool) for each in factors])
    if name == "grammar":
        return _grammar(language_tool)
    if name == "inclusion":
        return _inclusion
    if name == "inverse_bleu":
        return _inverse_bleu()
    if name == "bertscore":
        return _bertscore()
    return _rouge(name)


def _inclusion(texts: Sequence[str], against: Sequence[Reference]) -> list[float]:
    return [
        float(all(word in text for word in reference.words))
        for text, reference in zip(texts, against, strict=True)
    ]


def _package(metric: str, module: str, remedy: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the metric {metric} is computed by another package ({error}): {remedy}, "
            "or choose another metric (--text-metrics)"
        ) from None


# All tasks of a run ask the same LanguageTool, and the same model.
@cache
def _grammar(server: str | None) -> Measure:
    package = _package(
        "grammar", "language_tool_python", "pip install language-tool-python"
    )
    try:
        # Without a server it starts Java, and downloads LanguageTool the first time.
        tool = package.LanguageTool(
            LANGUAGE,
            **(
                {"remote_server": server}
                if server
                else {"config": {"maxCheckThreads": 1}}
            ),
        )
        tool.check(PROBE)
    except Exception as error:
        raise ValueError(
            "the metric grammar asks LanguageTool, which does not answer "
            f"({error}): it needs Java and its download, or the address of a server "
            "(--language-tool URL); or choose another metric (--text-metrics)"
        ) from error

    # An answer that several metrics read is checked once.
    @cache
    def is_clean(text: str) -> bool:
        return bool(text) and not tool.check(text)

    return lambda texts, against: [float(is_clean(text.strip())) for text in texts]


def _rouge(name: str) -> Measure:
    package = _package(name, "rouge_score.rouge_scorer", "pip install 'vllm-dlm[eval]'")
    scorer = package.RougeScorer([name], use_stemmer=True)
    return lambda texts, against: [
        scorer.score(reference.summary.strip(), text.strip())[name].fmeasure
        for text, reference in zip(texts, against, strict=True)
    ]


def _inverse_bleu() -> Measure:
    package = _package("inverse_bleu", "sacrebleu", "pip install 'vllm-dlm[eval]'")
    # As published: no smoothing, so that a text without four words in a row of the
    # sentence has BLEU 0.
    bleu = package.BLEU(
        smooth_method="none", effective_order=False, max_ngram_order=BLEU_ORDERS
    )

    def inverse(text: str, reference: Reference) -> float:
        if not text:
            return 0.0
        # Of a copy it is 100, or a little more by rounding.
        return max(0.0, 1 - bleu.corpus_score([text], [[reference.text]]).score / 100)

    def measure(texts: Sequence[str], against: Sequence[Reference]) -> list[float]:
        pairs = zip(texts, against, strict=True)
        return [inverse(text.strip(), reference) for text, reference in pairs]

    return measure


@cache
def _bertscore() -> Measure:
    package = _package("bertscore", "bert_score", "pip install bert-score")
    try:
        scorer = package.BERTScorer(lang="en")
    except Exception as error:
        raise ValueError(
            f"the metric bertscore needs the model roberta-large ({error}): have it in "
            "Hugging Face's cache, or choose another metric (--text-metrics)"
        ) from error

    def measure(texts: Sequence[str], against: Sequence[Reference]) -> list[float]:
        found = [0.0] * len(texts)
        kept = [i for i, text in enumerate(texts) if text.strip()]
        if kept:
            sentences = [against[i].text for i in kept]
            scores = scorer.score([texts[i].strip() for i in kept], sentences)[2]
            for i, score in zip(kept, scores.tolist(), strict=True):
                found[i] = score
        return found

    return measure


def _product(measures: Sequence[Measure]) -> Measure:
    def measure(texts: Sequence[str], against: Sequence[Reference]) -> list[float]:
        found = [1.0] * len(texts)
        for each in measures:
            scores = each(texts, against)
            found = [a * b for a, b in zip(found, scores, strict=True)]
        return found

    return measure
