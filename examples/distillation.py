"""TULIP's distillation: a text tower with a longer context learns the features of a stock model's text tower.

    python -m training.main --experiment examples/distillation.py --teacher ViT-B-16 --teacher-weights openai \\
        --model lotlip_clip-ViT-B-16 --lock-image --train-data ...
    python -m training.main --experiment examples/distillation.py --teacher-key teacher_features --train-data ...

Najdenkoska et al., TULIP: Token-length Upgraded CLIP (arXiv 2410.10034), section 3, distillation of relative positions:

    loss = 1 - mean cosine(teacher(text), student(text))

of texts that fit into the teacher's context. Here the text is the short caption; the teacher cuts what does not fit.
With --teacher-key, its features are a list of numbers under this key of the sample's JSON, and no teacher is loaded.

What differs: TULIP's student has rotary positions and the teacher's weights, here it is any text tower with the same
number of dimensions. --contrastive-weight adds the loss of the flags, which TULIP uses alone in a second stage.
"""

from functools import cached_property

import torch
from torch import nn
from torch.nn.functional import normalize

from training import Experiment, create_model, get_tokenizer
from training.readers.faults import BadSample


class Distillation(Experiment):
    def __init__(self, args):
        super().__init__(args)
        if bool(args.teacher) == bool(args.teacher_key):
            raise ValueError("--teacher, --teacher-key: give one of both, a model or the key of its cached features")

    @classmethod
    def add_flags(cls, group):
        group.add_argument("--teacher", metavar="MODEL", help="model whose text features are learned")
        group.add_argument("--teacher-weights", metavar="TAG|FILE", help="weights of --teacher, as --pretrained")
        group.add_argument("--teacher-key", metavar="KEY", help="key of its text feature in a sample's JSON, instead")
        group.add_argument(
            "--contrastive-weight", type=float, default=0.0, help="weight of the loss of the other flags"
        )

    @cached_property
    def tokenizer(self):
        return get_tokenizer(self.args.teacher)

    def sample_fields(self, record, texts):
        if self.args.teacher:
            return {"teacher_ids": self.tokenizer(texts[:1])[0]}
        if not isinstance(record.get(self.args.teacher_key), list):
            raise BadSample("no teacher feature")
        return {"teacher_features": torch.tensor(record[self.args.teacher_key])}

    def make_loss(self, loss, core):
        teacher = None
        if self.args.teacher:
            teacher = create_model(self.args.teacher, self.args.teacher_weights).eval().requires_grad_(False)
            teacher.to(core.logit_scale.device)
            sizes = [model.lotlip_config["model_cfg"]["embed_dim"] for model in (teacher, core)]
            if sizes[0] != sizes[1]:
                raise ValueError(f"--teacher {self.args.teacher}: {sizes[0]} dimensions, --model has {sizes[1]}")
        return WithTeacher(loss, teacher, self.args.contrastive_weight)


class WithTeacher(nn.Module):
    def __init__(self, loss: nn.Module, teacher: nn.Module | None, contrastive_weight: float):
        super().__init__()
        self.loss, self.contrastive_weight = loss, contrastive_weight
        self.teacher = (teacher,)  # in a tuple, because as a submodule it would be saved in every checkpoint

    def forward(self, teacher_ids=None, teacher_features=None, **inputs):
        """Returns ``distillation_loss`` and the weighted terms of the loss of the flags.

        Args:
            teacher_ids: [batch, seq_len], tokens of the short caption for the teacher.
            teacher_features: [batch, dim] instead.
        """
        if teacher_ids is not None:
            with torch.no_grad():
                teacher_features = self.teacher[0].encode_text(teacher_ids)
        texts = inputs["text_features"]
        student = texts[:, 0] if texts.ndim == 3 else texts
        cosine = (student * normalize(teacher_features.float(), dim=-1)).sum(-1)
        # With weight 0, too, so that every parameter that is trained has a gradient.
        terms = {name: self.contrastive_weight * value for name, value in self.loss(**inputs).items()}
        return terms | {"distillation_loss": 1 - cosine.mean()}
