import random, sys
from pathlib import Path
from tempfile import TemporaryDirectory
from tests.data.made import numbered_shards
import tests.runs as R
import tests.test_worlds as W
old=R.arguments_of
if __name__=="__main__":
    for lr in ("1e-3","3e-4"):
        W.arguments_of=lambda *a,lr=lr,**k:[x if not x.startswith("optim.lr") else f"optim.lr={lr}" for x in old(*a,**k)]
        d=Path(TemporaryDirectory().name); d.mkdir()
        s=numbered_shards(d/"shards",W.COUNTS)
        W.run(s,d/"a",steps=200)
        W.run(s,d/"b",steps=50); W.run(s,d/"b",steps=200,ranks=2)
        a,b=R.losses_of(d/"a"),R.losses_of(d/"b")
        print(lr,{k:f"{abs(a[k]-b[k]):.0e}" for k in range(40,201,10)}, a[1],a[100],a[200], max(abs(a[k]-b[k]) for k in a),flush=True)
