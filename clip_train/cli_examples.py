"""Three working examples for each tool, which its `--help` begins with."""

from __future__ import annotations

import inspect

import typer

EXAMPLES = {
    "classify": """\
clip-train classify cat.jpg --labels "a corgi,a cat" --model runs/demo
clip-train classify pictures --labels-file labels.txt --templates simple --top 3
clip-train classify 'pictures/*.png' --labels "a cat" --min-similarity 0.25 --json""",
    "search": """\
clip-train search "a red circle" pictures --model runs/demo --top 10
clip-train search cat.jpg pictures --html found.html
clip-train search "a red circle" pictures --json --index /scratch/index""",
    "prompts": """\
clip-train prompts runs/demo shards/demo/classes
clip-train prompts runs/demo /data/imagenet --split val --most 12 --name imagenet
clip-train prompts ViT-B/32 shards/demo/classes --templates mine.txt --out chosen.txt""",
    "export": """\
clip-train export runs/demo --to all --verify
clip-train export ViT-B-32.pt --to onnx --int8
clip-train export runs/demo --weights ema --out exports/demo --push ORG/NAME""",
    "compare": """\
clip-train compare runs/first runs/second --html comparison.html
clip-train compare runs/first runs/second --metric imagenet/acc1
clip-train compare runs/a-seed=0,runs/a-seed=1 runs/b-seed=0,runs/b-seed=1""",
    "doctor": """\
clip-train doctor
clip-train doctor --run runs/demo
clip-train doctor --run runs/demo --bundle report.txt""",
    "report": """\
clip-train report runs/demo
clip-train report sweeps/demo/trial-003
clip-train report /scratch/runs/first""",
    "help": """\
clip-train help optim.lr
clip-train help data.cache
clip-train help evaluation.NAME.templates""",
    "shards make": """\
clip-train shards make ~/pictures shards/mine --val 0.01 --jobs 8
clip-train shards make captions.csv shards/mine --image-col file --caption-col text --dry-run
clip-train shards make dataset_coco.json eval/coco --layout eval --images COCO""",
    "shards index": """\
clip-train shards index shards/mine/train --crc
clip-train shards index shards/laion --filter 'similarity>=0.3' --filter LANGUAGE=en
clip-train shards index shards/mine/train --quarantine runs/first/bad""",
    "shards check": """\
clip-train shards check shards/mine/train --batch-size 4096
clip-train shards check 's3://bucket/cc12m/{0000..1242}.tar' --world 8 --workers 4
clip-train shards check shards/mine/train --caption json:alt --json""",
    "shards overlap": """\
clip-train shards overlap shards/mine/train /data/imagenet/val
clip-train shards overlap shards/mine/train /data/imagenet/val /data/flickr30k --out leaked.csv
clip-train shards overlap shards/mine/train shards/mine/val --distance 4 --likeness 0.99""",
    "shards show": """\
clip-train shards show shards/mine/train sheet.html
clip-train shards show shards/mine/train sheet.html --num 60 --image-size 336
clip-train shards show shards/mine/train sheet.html --caption json:alt --seed 1""",
    "shards scenes": """\
clip-train shards scenes shards/demo
clip-train shards scenes shards/small --train 2000
clip-train shards scenes shards/fresh --train 10 --seed 7""",
    "shards replay": """\
clip-train shards replay runs/demo --step 100
clip-train shards replay runs/demo --step 100 --images batch
clip-train shards replay sweeps/demo/trial-003 --step 1""",
    "runs ls": """\
clip-train runs ls
clip-train runs ls sweeps/demo
clip-train runs ls --where 'model.name==ViT-B-32 and imagenet/acc1>0.3'""",
    "runs show": """\
clip-train runs show runs/demo
clip-train runs show sweeps/demo/trial-003
clip-train runs show /scratch/runs/first""",
    "runs rm": """\
clip-train runs rm runs/first
clip-train runs rm runs/first runs/second
clip-train runs rm runs/first --yes""",
    "tokenizer train": """\
clip-train tokenizer train shards/mine/train mine.json --vocab-size 32000
clip-train tokenizer train 'shards/mine/train/{000..009}.tar' mine.json --vocab-size 8000 --cleaning whitespace
clip-train tokenizer train shards/mine/train mine.json --vocab-size 32000 --caption json:alt""",
    "selftest reliability": """\
clip-train selftest reliability
clip-train selftest reliability --seed 7
clip-train selftest reliability --keep /tmp/selftest""",
}


def add_examples(app: typer.Typer, *, group: str = "") -> None:
    """Put the examples of each command, and of those in its groups, behind the first sentence of its help."""
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        if examples := EXAMPLES.get(f"{group} {name}".strip()):
            lines = "\n".join(f"  {line}" for line in examples.splitlines())
            sentence, _, rest = inspect.cleandoc(command.callback.__doc__ or "").partition("\n\n")
            command.help = "\n\n".join(part for part in (sentence, f"\b\n{lines}", rest) if part)
    for below in app.registered_groups:
        assert below.typer_instance is not None
        add_examples(below.typer_instance, group=below.name or "")
