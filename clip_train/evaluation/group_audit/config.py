"""Choices of `evaluation.NAME` with the name `group_audit`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clip_train.errors import UserError
from clip_train.evaluation.classify.config import ClassifyConfig

if TYPE_CHECKING:
    from clip_train.evaluation.evaluator import Setting
    from clip_train.evaluation.group_audit.evaluator import GroupAudit


@dataclass(slots=True, kw_only=True)
class GroupAuditConfig(ClassifyConfig):
    """Zero-shot classification compared between groups of images."""

    name: str = "group_audit"
    groups: str = "auto"
    """CSV file with the column `key` or `path` (the picture below its set, the sample) and a column per grouping;
    an empty cell is no group. `auto`: `groups.csv` in `root` or in its split, else the `.npy` of each sample."""
    npy_columns: list[str] = field(default_factory=list)
    """What the integers of each sample's `.npy` are, in order, as in `[region, year, y]`."""
    columns: list[str] = field(default_factory=list)
    """Columns to audit; empty: all."""
    values: dict[str, list[str]] = field(default_factory=dict)
    """What the integers 0, 1 … of a `.npy` column stand for, as in `{region: [Asia, Europe, Africa]}`; integers of
    other columns are shown as they are."""
    edges: dict[str, list[float]] = field(default_factory=dict)
    """Columns of amounts -> where one group ends and the next begins, as in `{income: [200, 684]}` for three groups; an
    edge belongs to the group below it."""
    queries: str | None = None
    """File with one text per line whose retrieved pictures are examined for skew; null: the classes' own prompts."""
    skew_k: int = 100
    """Retrieved pictures over which the skew counts."""

    def __post_init__(self) -> None:
        # Not super(): with slots=True it would name the class that the decorator replaced.
        ClassifyConfig.__post_init__(self)
        if self.skew_k < 1:
            raise UserError(f"skew_k={self.skew_k} must be at least 1")
        if unknown := sorted(self.values.keys() - set(self.npy_columns)):
            raise UserError(f"values names {unknown[0]}, which is not one of npy_columns={self.npy_columns}")
        for column, edges in self.edges.items():
            if not edges or sorted(set(edges)) != list(edges):
                raise UserError(f"edges.{column}={list(edges)} must list rising numbers")

    def open(self, setting: Setting) -> GroupAudit:
        """Open images and groups and make the evaluator. Every rank reads the same lists."""
        from clip_train.evaluation.classify.labelled_images import open_labelled_images
        from clip_train.evaluation.group_audit.columns import open_columns
        from clip_train.evaluation.group_audit.evaluator import GroupAudit
        from clip_train.evaluation.prompts.files import read_lines

        images = open_labelled_images(
            self.root, split=self.split, classnames=self.classnames, templates=self.templates,
            label_column=self.label_column, cache=self.cache.build(),
        )  # fmt: skip
        columns = open_columns(
            images.source, root=self.root, split=self.split, groups=self.groups, npy_columns=self.npy_columns,
            chosen=self.columns, values=self.values, edges=self.edges,
        )  # fmt: skip
        queries = None if self.queries is None else read_lines(self.queries)
        return GroupAudit(images, columns=columns, queries=queries, skew_k=self.skew_k, setting=setting)
