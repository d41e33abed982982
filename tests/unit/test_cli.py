"""The command's output for wrong overrides, --help and --cfg, and its speed."""

import importlib.util
import re
import sys

import hydra
import pytest
from omegaconf import OmegaConf

import ftexp.config.checks.scaling
from ftexp.cli import explain
from ftexp.cli.compose import run_hydra, to_config
from ftexp.cli.exit_codes import exit_code_of, print_error
from ftexp.cluster.interruptible import Terminated
from ftexp.config.checks.validate import validate
from ftexp.config.schema import config_dir
from ftexp.errors import ConfigError, DataError, FtexpError, RunFailedError
from ftexp.evaluate import command as evaluate

GROUPS = sorted(
    directory.name for directory in config_dir().iterdir() if directory.is_dir() and directory.name != "hydra"
)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Function that runs the command up to and including validation; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # run_hydra sets it; this restores it afterwards
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(ftexp.config.checks.scaling, "num_local_gpus", lambda: 0)

    def run(*words, task=lambda job: validate(to_config(job))):
        code = run_hydra(task, words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


# name: (overrides, *texts that stderr must contain: the key with its value, and the fix)
WRONG = {
    # missing keys
    "unknown key": ("optim.lrr=1", "optim.lrr is not a key", "Did you mean 'optim.lr'?", "weight_decay"),
    "unknown key with +": ("+optim.lrr=1", "optim.lrr is not a key", "Did you mean 'optim.lr'?"),
    "unknown key with ++": ("++optim.lrr=1", "optim.lrr is not a key", "Did you mean 'optim.lr'?"),
    "unknown top-level key": ("sed=1", "sed is not a key", "Did you mean 'seed'?", "Keys at the top: seed"),
    "unknown top-level key with +": ("+sed=1", "sed is not a key", "Did you mean 'seed'?"),
    "key of another group": ("data.lr=1", "data.lr is not a key", "Did you mean 'optim.lr'?", "Keys of data: name"),
    "key of timm's": (
        "train.batch_size=64",
        "Did you mean 'train.global_batch_size' or 'train.eval_batch_size'?",
    ),
    "key of timm's at the top": ("epochs=3", "epochs is not a key", "Did you mean 'train.epochs'?"),
    "unknown group": ("optm=sgd", "optm is not a key", "Did you mean 'optim'?"),
    "key under an unknown group": ("optm.lr=1", "optm is not a key", "Did you mean 'optim'?"),
    "key of Hydra's that isn't": ("hydra.foo=1", "hydra.foo is not a key"),
    "key under a value": ("scaling.label_selector.a=b", "scaling.label_selector holds one value"),
    # group options
    "unknown option": ("optim=sgdd", "optim=sgdd is unknown", "Did you mean 'sgd'?", "Available: adamw, lamb, sgd"),
    "unknown augmentation": ("augment=nonne", "augment=nonne is unknown", "Did you mean 'none'?"),
    "unknown experiment": ("experiment=smokee", "experiment=smokee is unknown", "Did you mean 'smoke'?"),
    "option null": ("optim=null", "optim=null is unknown", "Available: adamw, lamb, sgd"),
    "option that is a number": ("train=5", "train=5 is unknown", "Available: default"),
    "group with a value": ("run=first", "run=first is not allowed", "write run.<key>=..."),
    # types
    "text for a number": ("optim.lr=fast", "optim.lr=fast is not a number"),
    "text for a count": ("seed=one", "seed=one is not a whole number"),
    "fraction for a count": ("train.epochs=2.5", "train.epochs=2.5 is not a whole number"),
    "neither true nor false": ("train.channels_last=maybe", "train.channels_last=maybe is not true or false"),
    "no way to compile": ("train.compile=maybe", "train.compile=maybe is not one of none, model, blocks"),
    "one value for a list": ("plugins=mine", "plugins=mine must be a list: plugins=[mine]"),
    "text in a list of numbers": ("data.mean=[a]", "data.mean[0]=a is not a number"),
    "null in a list of numbers": ("data.mean=[null]", "data.mean[0]=null is not allowed"),
    "number for a dict": ("model.kwargs=3", "model.kwargs=3 is not allowed", "model.kwargs.<key>=..."),
    "text for an open mapping": (
        "model.kwargs=${run.storage}",
        "model.kwargs=runs is not allowed: model.kwargs holds keys, so write model.kwargs.<key>=...",
    ),
    "text for a group": ("run=${data.name}", "run=digits is not allowed: run holds keys"),
    "list for a mapping": ("train.freeze=[1]", "train.freeze=[1] is not allowed: train.freeze holds keys"),
    "number in a mapping of such": ("model.preset.vit=3", "model.preset.vit=3 is not allowed", "vit.<key>="),
    "mapping for a list": ("chaos.kinds={a:1}", "chaos.kinds={a:1} is not allowed: chaos.kinds is a list"),
    "text for a list": ("plugins=${run.storage}", "plugins=runs must be a list: plugins=[runs]"),
    "list in a list of text": ("chaos.kinds=[1,[2]]", "chaos.kinds[1]=[2] is not text"),
    "list for text": ("plugins=[[1]]", "plugins"),
    "key that is a number": ("model.kwargs={3:1}", "model.kwargs.3: a key must be text, and 3 is not"),
    "option in a list of lists": ("ema=[[a]]", "ema=[[a]] is unknown", "Available: none, warmup"),
    "no workers in a list": ("scaling.num_workers=[]", "scaling.num_workers=[] must be a whole number", "or auto"),
    "labels that are none": ("scaling.label_selector=[zone]", "scaling.label_selector=['zone'] must be {label: text}"),
    "labels for others": (
        "scaling.label_selector=[{zone:a}] scaling.num_workers=2",
        "scaling.label_selector=[{'zone': 'a'}] has 1 entries for scaling.num_workers=2: give 2, one per worker",
    ),
    "null": ("train.epochs=null", "train.epochs=null is not allowed: it must have a value"),
    "null for a dict": ("model.kwargs=null", "model.kwargs=null is not allowed"),
    "mandatory value left out": ("~optim", "optim.name is not set", "add optim.name=..."),
    # ranges and choices
    "no epochs": ("train.epochs=0", "train.epochs=0 is out of range", "at least 1"),
    "negative rate": ("optim.lr=-1", "optim.lr=-1.0 is out of range", "above 0"),
    "rate that is not a number": ("optim.lr=nan", "optim.lr=nan is out of range", "above 0"),
    "infinite rate": ("optim.lr=inf", "optim.lr=inf is out of range", "finite"),
    "mean that is not a number": ("data.mean=[nan]", "data.mean=[nan]", "finite"),
    "infinite std": ("data.std=[inf]", "data.std=[inf]", "finite"),
    "std 0": ("data.std=[0]", "data.std=[0.0]", "above 0"),
    "too large a seed": ("seed=4294967296", "seed=4294967296 is out of range", "at most 4294967295"),
    "one checkpoint kept": ("checkpoint.num_to_keep=1", "checkpoint.num_to_keep=1 is out of range", "at least 2"),
    "choice": ("train.precision=bf61", "train.precision='bf61' is not one of fp32, bf16", "Did you mean 'bf16'?"),
    "schedule": ("schedule.name=cosin", "schedule.name='cosin' is not one of", "Did you mean 'cosine'?"),
    "number of workers": ("scaling.num_workers=0", "scaling.num_workers=0 must be a whole number", "or auto"),
    "workers null": ("scaling.num_workers=null", "scaling.num_workers=null must be a whole number"),
    "workers upside down": ("scaling.num_workers=[2,1]", "scaling.num_workers=[2, 1]", "the first (min)"),
    "1 for true": ("scaling.use_gpu=1", "scaling.use_gpu=1 must be true, false or auto"),
    "less than no CPU": ("scaling.resources_per_worker={CPU:-1}", "scaling.resources_per_worker.CPU=-1", "from 0"),
    "no run name": ("run.name=", "run.name=''", "give another name"),
    "run name that leaves": ("run.name=../other", "run.name='../other'", "give another name"),
    # names
    "unknown model": ("model.name=resnet_18", "model.name='resnet_18' is unknown", "Did you mean", "resnet18"),
    "unknown model of no group": ("model.name=swin_tiny_patch4_window7_223", "Did you mean 'swin_tiny_patch4_"),
    "a group's name": ("model.name=vit_tiny", "model.name='vit_tiny'", "the config group option model=vit_tiny?"),
    "unknown optimiser": ("optim.name=adamww", "optim.name='adamww' is unknown", "Did you mean 'adamw'?"),
    "unknown source": ("data.name=digit", "data.name='digit' is unknown", "Did you mean 'digits'?", "cifar10"),
    "field of another source": ("data.num_samples=9", "data.num_samples=9 is not used by", "remove it"),
    "root without files": ("data.root=x", "data.root=x is not used by data.name=digits", "remove it"),
    "no root": ("data=parquet", "data.root is not set", "set data.root to their directory"),
    "window without blocks": (
        "data=image_folder data.root=x data.shuffle_window=8",
        "data.shuffle_window=8 is not used by data.name=image_folder",
        "remove it",
    ),
    "streaming what is in memory": (
        "data.feed=streaming",
        "data.feed=streaming: data.name=digits is held in memory",
        "set data.feed=cached",
    ),
    "window of nothing": ("data.shuffle_window=0", "data.shuffle_window=0 is out of range", "at least 1"),
    "weights that aren't there": ("model.pretrained=no.pt", "model.pretrained=no.pt: no such file", "or true"),
    # contradictions
    "mean of another length": ("data.mean=[0.1,0.2]", "data.mean=[0.1, 0.2] has 2 values", "data.channels=1"),
    "patches that don't fit": ("data.image_size=10", "data.image_size=10 is not divisible", "size 4", "[1, 2]"),
    "more workers than samples": ("scaling.num_workers=64", "scaling.num_workers", "= 64 x 1", "global_batch_size=32"),
    "GPU": ("scaling=single_gpu", "scaling.use_gpu=true, but this machine has no GPU", "set scaling=local"),
    "GPU's backend without one": ("scaling.backend=nccl scaling.use_gpu=false", "scaling.backend=nccl", "use gloo"),
    "auto on a cluster": ("scaling=cluster", "scaling.num_workers=auto counts only this machine", "give a number"),
    "GPU left open on a cluster": (
        "scaling.address=auto scaling.num_workers=2",
        "scaling.use_gpu=auto looks only at this machine",
        "set true or false",
    ),
    "a GPU for two": (
        "scaling.use_gpu=auto scaling.num_workers=2 scaling.resources_per_worker.GPU=0.5",
        "scaling.resources_per_worker.GPU=0.5: NCCL needs a whole GPU per worker",
        "set scaling.backend=gloo",
    ),
    "a name that a URI reads otherwise": (
        "run.storage=gs://bucket/runs run.name='lr#1'",
        "run.name=lr#1 holds #, which have another meaning in a URI",
        "remove them",
    ),
    "Ray Client": ("scaling.address=ray://h:1 scaling.num_workers=2", "scaling.address=ray://h:1", "address=auto"),
    "kwargs that follow the data": ("model.kwargs.num_classes=3", "model.kwargs.num_classes=3", "set data.num_classes"),
    "feature maps": ("model.kwargs.features_only=true", "features_only=True: the model then returns a list",
        "remove it"),
    "a tuple": ("model.name=inception_v3 model.kwargs.aux_logits=true", "model.kwargs.aux_logits=True", "remove it"),
    "kwargs beside a field": ("model.kwargs.pretrained=true", "model.kwargs.pretrained=True", "model.pretrained"),
    "rate given twice": ("optim.kwargs.lr=1", "optim.kwargs.lr", "set only optim.lr"),
    "nothing to train on": ("data.val_fraction=0.6 data.test_fraction=0.6", "0.6", "below 1"),
    "warm-up as long as training": ("schedule.warmup_epochs=30", "schedule.warmup_epochs=30.0", "train.epochs=30"),
    "fp16 without its state": ("train.precision=fp16 checkpoint.extra_state=[progress]", "must hold scaler"),
    # the recipe
    "average without its state": ("ema.decay=0.9 checkpoint.extra_state=[progress]", "must hold ema, since ema.decay"),
    "warm-up of no average": ("ema.use_warmup=true", "ema.use_warmup=True needs ema.decay", "remove it"),
    "power of no warm-up": ("ema.decay=0.9 ema.warmup_power=0.5", "ema.warmup_power=0.5 needs ema.use_warmup=true"),
    "average of everything": ("ema.decay=1", "ema.decay=1.0 is out of range", "at most 0.999999"),
    "score of no average": (
        "checkpoint.checkpoint_score_attribute=val_loss_ema",
        "is a metric of the EMA: set ema.decay",
    ),
    "objective of no average": (
        "sweep.metric=val_loss_ema sweep.mode=min",
        "sweep.metric=val_loss_ema is a metric of the EMA",
    ),
    "mix mode of nothing": ("augment.mix_mode=pair", "augment.mix_mode=pair needs augment.mixup_alpha or"),
    "unknown mix mode": ("augment.mixup_alpha=1 augment.mix_mode=pairs", "'pairs' is not one of batch", "mean 'pair'?"),
    "switch with one side": ("augment.mixup_alpha=1 augment.mix_switch_prob=0.1", "needs both mixup_alpha and cutmix"),
    "mixing one sample": ("augment.mixup_alpha=1 train.global_batch_size=1", "mix two samples", "raise it"),
    "mixing off after the end": (
        "augment.mixup_alpha=1 train.epochs=3 augment.mixup_off_epoch=3",
        "augment.mixup_off_epoch=3 is after the last epoch, 2 (train.epochs=3)",
        "set null",
    ),
    "no mixing to end": ("augment.mixup_off_epoch=3", "augment.mixup_off_epoch=3 needs augment.mixup_alpha or"),
    "repeats of what never changes": ("augment=none augment.repeats=3", "no augmentation changes", "repeats=1"),
    "repeats that fill a batch": ("augment.repeats=65 train.global_batch_size=64", "raise it to 65 at least"),
    "repeats mixed with themselves": (
        "augment.mixup_alpha=1 augment.repeats=3 train.global_batch_size=5",
        "augment.repeats=3 with train.global_batch_size=5: a sample would be mixed with itself; raise it to 6",
    ),
    "unknown sampling": ("data.sampling=balance", "'balance' is not one of shuffle, balanced, sqrt", "'balanced'?"),
    "classes out of blocks": (
        "data=parquet data.root=x data.sampling=sqrt data.shuffle_window=8",
        "data.sampling=sqrt draws single samples, and data.shuffle_window=8 reads whole blocks",
        "set data.sampling=shuffle, or data.shuffle_window=null (parquet: with data.feed=cached)",
    ),
    "erasing nothing": ("augment.erase_mode=pixel", "augment.erase_mode=pixel needs augment.erase_prob above 0"),
    "RandAugment misspelt": ("augment.rand_augment=randm9", "augment.rand_augment=randm9 can't be read", "rand-m9-n2"),
    "RandAugment's probability": ("augment.rand_augment=rand-m9-p.5", "rand-m9-p.5 can't be read", "probability"),
    "second derivatives": ("optim.name=adahessian", "adahessian needs second derivatives", "choose another"),
    "score of no metric": (
        "checkpoint.checkpoint_score_attribute=val_acuracy",
        "checkpoint.checkpoint_score_attribute=val_acuracy is not a logged metric",
        "Did you mean 'val_accuracy'?",
    ),
    "score at the end only": (
        "checkpoint.checkpoint_score_attribute=test_accuracy",
        "checkpoint.checkpoint_score_attribute=test_accuracy is measured only once, at the end",
        "val_accuracy",
    ),
    "score's order": (
        "checkpoint.checkpoint_score_attribute=val_loss",
        "val_loss is best at its minimum, but checkpoint.checkpoint_score_order=max",
        "set it to min",
    ),
    "decay of another schedule": (
        "schedule.decay_epochs=5",
        "schedule.decay_epochs=5",
        "needs schedule=step",
    ),
    "least rate of a schedule without": (
        "schedule=constant schedule.min_lr=1e-6",
        "schedule.min_lr=1e-06",
        "needs schedule=cosine or poly",
    ),
    "RandAugment of no set": ("augment.rand_augment=rand-m9-tnope", "tnope is not one of timm's sets", "tweights"),
    "RandAugment on four channels": (
        "data=synthetic augment.rand_augment=rand-m9 data.channels=4 data.mean=[0,0,0,0] data.std=[1,1,1,1]",
        "grey or RGB images, but data.channels=4",
    ),
    "RandAugment twice": (
        "augment=deit augment.rand_augment=rand-m9", "rand_augment=rand-m9 conflicts with", "auto_augment=rand-m9",
    ),
    "crop of more than there is": (
        "augment.crop=rrc augment.scale=[0.5,1.5] augment.pad_px=0", "augment.scale=[0.5, 1.5] must be [min, max]",
        "at most 1", "for example augment.scale=[0.08,1]",
    ),
    "scale that is reversed": ("augment.crop=rrc augment.scale=[1,0.5]", "scale=[1.0, 0.5] must", "smaller first"),
    "ratio of one number": ("augment.crop=rkrr augment.ratio=[1]", "augment.ratio=[1.0] must be [min, max]"),
    "ratio of nothing": ("augment.crop=rrc augment.ratio=[0,1]", "augment.ratio=[0.0, 1.0] must", "above 0"),
    "scale without a crop": ("augment.scale=[0.5,1]", "scale=[0.5, 1.0] needs augment.crop=rrc or rkrc or"),
    "interpolation without a crop": ("augment.interpolation=bicubic", "needs augment.crop or augment.auto_augment"),
    "unknown crop": ("augment.crop=rcc", "'rcc' is not one of none, rrc, rkrc, rkrr", "Did you mean 'rrc'?"),
    "crop beside a shift": (
        "augment.crop=rrc augment.pad_px=1", "pad_px=1 conflicts with augment.crop=rrc: set augment.pad_px=0",
    ),
    "unknown auto_augment": (
        "augment.auto_augment=orignal", "augment.auto_augment=orignal can't be read", "Did you mean 'original'?",
    ),
    "auto_augment misspelt": ("augment.auto_augment=rand-k9", "rand-k9 can't be read", "write rand-m9-n2-mstd0.5-inc1"),
    "AugMix misspelt": ("augment.auto_augment=augmix-w0", "augmix-w0 can't be read", "write augmix-m3-w3"),
    "policy with more than its spread": ("augment.auto_augment=v0-m9", "v0-m9 can't be read", "original-mstd0.5"),
    "colour jitter of two": ("augment.color_jitter=[0.1,0.2]", "augment.color_jitter=[0.1, 0.2] must be a number, or"),
    "colour jitter in words": ("augment.color_jitter=much", "augment.color_jitter=much must be a number"),
    "hue beyond half a turn": ("augment.color_jitter=[0,0,0,0.6]", "hue, the fourth value, must be at most 0.5"),
    "probability of no jitter": ("augment.color_jitter_prob=0.5", "color_jitter_prob=0.5 needs augment.color_jitter"),
    "pictures of four channels": (
        "data=synthetic augment.vflip=0.5 data.channels=4 data.mean=[0,0,0,0] data.std=[1,1,1,1]",
        "augment.vflip=0.5 needs grey or RGB images, but data.channels=4",
    ),
    "evaluation's crop of what is in memory": ("data.crop_pct=0.9", "crop_pct=0.9 is not used by data.name=digits"),
    "CPUs to decode what is in memory": ("data.decode_cpus=2", "decode_cpus=2 is not used by data.name=digits"),
    "decoder misspelt": ("data=parquet data.root=. data.decoder=pilow", "torchvision, pillow", "mean 'pillow'?"),
    "decoder of what is in memory": ("data.decoder=pillow data.bit_depth=8", "bit_depth=8 is not used by", "digits"),
    "background misspelt": ("data=parquet data.root=. data.background=wite", "=wite is not a colour", "#rrggbb"),
    "background that is transparent": (
        "data=parquet data.root=. data.background=#ffffff80", "data.background=#ffffff80 is not a colour",
    ),
    "17 bits of 16": ("data=parquet data.root=. data.bit_depth=17", "bit_depth=17 is out of range", "at most 16"),
    "size for parts of whole images": (
        "data=parquet data.root=. augment=none data.decode_size=500", "decode_size=500 is used only with augment.crop",
    ),
    "parts smaller than what models see": (
        "data=parquet data.root=. augment=none augment.crop=rrc data.decode_size=100", "data.decode_size=100",
        "at least data.image_size=224",
    ),
    "evaluation's crop too large": (
        "data=image_folder data.root=. data.crop_pct=1.2", "data.crop_pct=1.2 is out of range", "at most 1",
    ),
    "evaluation's unknown crop": (
        "data=image_folder data.root=. data.crop_mode=centre", "'centre' is not one of center, squash, border",
    ),
    "two ways to clip": ("train.clip_grad_norm=1 train.clip_grad_agc=0.1", "clip_grad_norm=1.0 and", "set only one"),
    "fused SGD beside fp16": ("optim=sgd optim.kwargs.fused=true train.precision=fp16", "optim.kwargs.fused=True:",
        "remove it"),
    "layers decayed twice": ("optim.kwargs.layer_decay=0.7", "optim.kwargs.layer_decay", "set only optim.layer_decay"),
    "layers that grow": ("optim.layer_decay=1.5", "optim.layer_decay=1.5 is out of range", "at most 1"),
    "depth of a model without": (
        "model.name=vgg11 model.drop_path_rate=0.1", "model.drop_path_rate=0.1: model.name=vgg11 has no stochastic",
    ),
    "depth given twice": ("model.drop_path_rate=0.1 model.kwargs.drop_path_rate=0.2", "conflicts with model.drop_path"),
    "frozen until the start": ("train.freeze={backbone:0}", "train.freeze.backbone=0 must be the first epoch"),
    "frozen until after the end": ("train.freeze={backbone:30}", "is after the last epoch", "or set null"),
    "frozen part in levels": ("train.freeze.blocks.0=1", "needs braces: 'train.freeze={blocks.0: 1}'"),
    "frozen for a word": ("train.freeze={backbone:soon}", "train.freeze.backbone=soon must be the first epoch"),
    # trackers
    "unknown tracker": ("tracker=mlfow", "tracker=mlfow is unknown", "Did you mean 'mlflow'?", "Available: mlflow"),
    "unknown tracker in a list": ("tracker=[none,wandbb]", "tracker=wandbb is unknown", "Did you mean 'wandb'?"),
    "unknown tracker by name": ("tracker.use.mlfow=true", "names 'mlfow', which is unknown", "Did you mean 'mlflow'?"),
    "setting of another tracker": (
        "tracker=wandb tracker.mlflow.experiment=x",
        "tracker.mlflow.experiment=x is not used",
        "add tracker=mlflow",
    ),
    # alerts
    "no URL": ("notify.urls=[somewhere]", "notify.urls[0] is not a URL: write https://<host>/<path>"),
    "URL of nobody": ("notify.urls=[https:///x]", "notify.urls[0]=https://*** has no host"),
    "URL of a service without apprise": ("notify.urls=[slack://a/secret/c]", "slack://*** needs the package apprise"),
    "alerts to nowhere": ("notify.max_recoveries=1", "notify.max_recoveries=1 is not used without notify.urls"),
    "unknown alert": ("notify.urls=[http://h/x] notify.alerts=[finish]", "'finish' is unknown", "mean 'finished'?"),
    "port of no tracker": ("tracker.prometheus.port=9000", "tracker.prometheus.port=9000 is not used", "add tracker="),
    "port that there isn't": (
        "tracker=prometheus tracker.prometheus.port=65536", "tracker.prometheus.port=65536 is out of range",
    ),
    "tags for nobody": ("tracker.tags.team=blue", "tracker.tags={'team': 'blue'} is not used by tracker=none"),
    "files in an object store": (
        "tracker=[tensorboard,mlflow] run.storage=s3://bucket/runs",
        "tracker=tensorboard writes to a disk",
        "set tracker.tensorboard.dir",
        "set tracker.mlflow.tracking_uri",
    ),
    "an object store for files": (
        "tracker=tensorboard tracker.tensorboard.dir=s3://bucket/boards",
        "tracker.tensorboard.dir=s3://bucket/boards is not on a disk",
        "give a local directory",
    ),
    "mode of wandb": ("tracker=wandb tracker.wandb.mode=of", "tracker.wandb.mode='of' is not one of offline, online"),
    "unknown chaos": ("chaos=kill_wroker", "chaos=kill_wroker is unknown", "Did you mean 'kill_worker'?"),
    "unknown kind of chaos": ("chaos.kind=rnadom", "chaos.kind='rnadom' is not one of", "Did you mean 'random'?"),
    "unknown fault": ("chaos.faults=[nope]", "chaos.faults[0]='nope' is unknown", "Available: raise, kill_worker"),
    "unknown fault in a dict": ("chaos.faults=[raise,{kind:flip_bite}]", "chaos.faults[1]='flip_bite' is unknown",
        "Did you mean 'flip_byte'?"),
    "unknown key of a fault": ("chaos.faults=[{kind:raise,stpe:3}]", "chaos.faults[0].stpe is not a key",
        "Did you mean 'step'?", "Keys: kind, step, rank, count, seconds"),
    "fault without a kind": ("chaos.faults=[{step:3}]", "chaos.faults[0]={'step': 3} must be a fault's name", "kind:"),
    "fault that is a number": ("chaos.faults=[3]", "chaos.faults[0]=3 must be a fault's name, or {kind: ..."),
    "fault before the first step": ("chaos.faults=[{kind:raise,step:0}]", "chaos.faults[0].step=0 must be a number",
        "at least 1"),
    "fault of half a step": ("chaos.faults=[{kind:raise,step:1.5}]", "chaos.faults[0].step=1.5 must be a number"),
    "fault on rank true": ("chaos.faults=[{kind:raise,rank:true}]", "chaos.faults[0].rank=True must be a number"),
    "unknown random fault": ("chaos=random chaos.kinds=[hnag]", "chaos.kinds='hnag' is unknown",
        "Did you mean 'hang'?"),
    "no random fault": ("chaos=random chaos.kinds=[]", "chaos.kinds=[]", "name at least one"),
    "faults beside random ones": ("chaos=random chaos.faults=[raise]", "chaos.faults conflicts with chaos.kind=random",
        "set only one"),
    "rate above 1": ("chaos=random chaos.rate=1.5", "chaos.rate=1.5 is out of range", "at most 1"),
    "chaos before the first step": ("chaos=raise chaos.step=0", "chaos.step=0 is out of range", "at least 1"),
    "resume": ("resume=maybe", "resume='maybe' is not one of auto, must, never"),
    "resume without a name": ("resume=must", "resume=must needs run.name", "every invocation starts a new run"),
    "save every 0 s": ("checkpoint.every_seconds=0", "checkpoint.every_seconds=0.0 is out of range", "above 0"),
    "save every infinite time": ("checkpoint.every_seconds=inf", "checkpoint.every_seconds=inf", "finite"),
    "save every -1 failures": ("checkpoint.max_failed_saves=-1", "checkpoint.max_failed_saves=-1", "at least 0"),
    "no steps": ("train.max_steps=0", "train.max_steps=0 is out of range", "at least 1"),
    "ledger": ("train.ledger=some", "train.ledger=some is not true or false"),
    "shards of whole models": (
        "checkpoint.format=sharded",
        "format=sharded with parallel=ddp: no parameter is sharded; set parallel=fsdp or checkpoint.format=auto",
    ),
    "run without its position": ("checkpoint.extra_state=[rng]", "checkpoint.extra_state=['rng'] must hold progress"),
    # failures
    "cause that isn't one": ("failure.max_by_cause={nope:1}", "failure.max_by_cause", "nope", "Available: bug, out_of"),
    "cause misspelt": ("failure.max_by_cause.crahs=1", "Did you mean 'crash'?"),
    "cause below 0": ("failure.max_by_cause.crash=-1", "crash=-1 must be at least 0", "remove it"),
    "cause of no number": ("failure.max_by_cause.crash=few", "failure.max_by_cause.crash=few is not a whole number"),
    "wait above the longest": ("failure.backoff_s=90", "failure.backoff_s=90.0 must not be above",
        "failure.max_backoff_s=60.0"),
    "hang at once": ("failure.hang_timeout_s=0", "failure.hang_timeout_s=0.0 is out of range", "above 0"),
    "forgiven at once": ("failure.refill_after_steps=0", "failure.refill_after_steps=0 is out of range", "at least 1"),
    "bad numbers": ("failure.on_nonfinite=skip", "failure.on_nonfinite='skip' is not one of raise, skip_step"),
    "hot start": ("scaling.hot_start=maybe", "scaling.hot_start='maybe' is not one of auto, on, off"),
    # syntax
    "no value": ("optim.lr", "can't read 'optim.lr': write key=value"),
    "open bracket": ("plugins=[a,", "can't read 'plugins=[a,'", "quote it: \"plugins='[a,'\""),
    "two equals signs": ("optim.lr=a=b", "can't read 'optim.lr=a=b'", "quote it: \"optim.lr='a=b'\""),
    "sweep without -m": ("optim.lr=1,2", "optim.lr=1,2", "--multirun"),
    "interpolation of nothing": ("run.name=${nothing}", "run.name: Interpolation key 'nothing' not found"),
    "interpolation of no kind": ("run.name=${no:kind}", "run.name: Unsupported interpolation type no"),
    "variable that isn't set": ("run.name=${oc.env:FTEXP_NOT_SET}", "run.name", "'FTEXP_NOT_SET' not found"),
    "option of another tool": (
        "--batch-size 3", "--batch-size is not an option: write settings as key=value", "'train.global_batch_size'",
    ),
    "option after a sweep": ("-m optim.lr=1,2 --bar", "--bar is not an option: write settings as key=value. Options:"),
    "config of another name": ("--config-name other", "--config-name other", "remove it"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["3", "[a]", "{a:b}", "null"])
def test_a_fault_whose_kind_is_no_text_is_a_wrong_config_too(kind, command):
    code, _, err = command(f"chaos.faults=[{{kind:{kind}}}]")
    assert code == 2
    assert "chaos.faults[0]" in err


@pytest.mark.parametrize("word", ["run=[", "run=@here", "run=*", "run=!x", "run=1.10", "run=a: b"])
def test_text_that_yaml_would_not_read_as_such_is_taken_as_it_is_typed(word):
    assert evaluate.parse([word]).run == word.removeprefix("run=")


def test_a_word_that_yaml_cannot_read_is_told_with_the_quotes_that_it_needs():
    with pytest.raises(ConfigError, match=r"can't read 'batch_size=\[': put the value in quotes, batch_size=\"'"):
        evaluate.parse(["run=x", "batch_size=["])


def test_a_tracker_whose_package_is_missing_names_the_extra(command, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "mlflow" else find(name))
    code, _, err = command("tracker=[tensorboard,mlflow]")
    assert code == 2
    assert "tracker=mlflow needs the package mlflow, which isn't installed: write uv run --extra mlflow" in err
    assert "tensorboard" not in err


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_command_names_the_key_the_value_and_the_fix(words, command):
    typed, *expected = WRONG[words]
    code, out, err = command(*typed.split())
    assert code == 2
    for text in expected:
        assert text in err
    assert err.startswith("ftexp: ")
    assert "Traceback" not in out + err
    assert len(err.splitlines()) <= 3  # nothing but the mistake
    assert out == ""


def test_mistakes_are_listed_together(command):
    code, _, err = command(
        *("train.epochs=0", "optim.lr=nan", "optim.name=addam", "model.name=vit_tinny"),
        *("scaling.use_gpu=true", "data.num_samples=3", "checkpoint.extra_state=[rng]"),
    )
    assert code == 2
    title, *lines = err.splitlines()
    assert title == "ftexp: the config is invalid:"
    keys = sorted(re.match(r"  ([\w.]+)", line)[1] for line in lines)
    assert keys == [
        *("checkpoint.extra_state", "data.num_samples", "model.name", "optim.lr", "optim.name"),
        *("scaling.use_gpu", "train.epochs"),
    ]


def test_unknown_keys_are_listed_together(command):
    _, _, err = command("+optim.lrr=1", "+run.nam=x", "+sed=3")
    assert [line.split()[0] for line in err.splitlines()[1:]] == ["run.nam", "optim.lrr", "sed"]


def test_a_right_command_prints_nothing_and_exits_with_0(command):
    assert command("optim=sgd", "model=resnet18") == (0, "", "")


def test_a_bug_in_the_task_is_not_passed_off_as_a_wrong_config(command):
    def task(_):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        command(task=task)


def test_ctrl_c_exits_with_130(command):
    def task(_):
        raise KeyboardInterrupt

    assert command(task=task)[0] == 130


def test_multirun_goes_on_after_a_failed_job_and_exits_with_the_worst_code(command):
    began = []

    def task(job):
        began.append(job.seed)
        if job.seed == 1:
            raise ConfigError("seed=1 is refused here")
        if job.seed == 2:
            raise DataError("seed=2 finds no data")

    code, _, err = command("-m", "seed=1,2,3", task=task)
    assert began == [1, 2, 3]
    assert code == 2
    assert err.splitlines() == ["ftexp: seed=1 is refused here", "ftexp: seed=2 finds no data"]
    assert command("-m", "seed=2,3", task=task)[0] == 1
    assert command("-m", "seed=3,4", task=task)[0] == 0


def test_a_multirun_leaves_no_note_with_secrets(command, tmp_path):
    note, seen = tmp_path / "note", []
    command("-m", "seed=1,2", f"hydra.sweep.dir={note}", task=lambda _: seen.append(list(note.iterdir())))
    assert seen == [[], []]


def test_multirun_sweeps_over_keys_that_need_a_plus(command):
    depths = []
    command("-m", "model.kwargs.depth=2,3", task=lambda job: depths.append(job.model.kwargs.depth))
    assert depths == [2, 3]


def test_multirun_validates_each_job(command):
    code, _, err = command("-m", "optim.lr=-1,0.1,-2")
    assert code == 2
    assert [line.split("=")[1].split()[0] for line in err.splitlines()] == ["-1.0", "-2.0"]


def test_an_error_of_several_lines_gets_a_title(capsys):
    print_error(FtexpError("first\nsecond"))
    assert capsys.readouterr().err == "ftexp: FtexpError:\n  first\n  second\n"


def help_text(command, capsys):
    with pytest.raises(SystemExit) as done:  # Hydra exits after --help
        command("--help")
    assert done.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_group_with_its_options_and_an_example(command, capsys):
    out = help_text(command, capsys)
    for group in GROUPS:
        options = sorted(file.stem for file in (config_dir() / group).glob("*.yaml"))
        assert f"{group}: {', '.join(options)}\n" in out
    examples = re.findall(r"^\s+python -m ftexp\.train (.+?)\s*(?:#.*)?$", out, re.MULTILINE)
    assert "model=vit failure.max_failures=3 run.name=first" in examples


def test_help_on_a_terminal_is_broken_between_words(command, capsys, monkeypatch):
    whole = help_text(command, capsys)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = help_text(command, capsys)
    assert max(map(len, whole.splitlines())) > 80 >= max(map(len, shown.splitlines()))
    assert shown.split() == whole.split()
    assert "\n  webdataset\n" in shown
    unwrapped = [line for line in whole.splitlines() if line.startswith("  ")]
    assert set(unwrapped) <= set(shown.splitlines())  # the examples stay on one line, to be copied


PLUGINS = "Your own are registered by a module listed in plugins=[...]."
OF_NO_PLUGIN = {
    "loss.name=hinge": ("loss.name='hinge' is unknown.", "Available: ce, bce,", PLUGINS),
    "train.metrics=[kappa]": ("train.metrics='kappa' is unknown.", "Available: top5,", PLUGINS),
    "data.name=mine": ("data.name='mine' is unknown.", "Available: cifar10,", PLUGINS),
    "tracker.use.mine=true": ("tracker.use names 'mine', which is unknown.", "Available: tensorboard,", PLUGINS),
    "model.name=my_net": ("model.name='my_net' is unknown.", "timm has", PLUGINS),
    "optim.name=my_optimiser": ("optim.name='my_optimiser' is unknown.", "Any timm optimiser can be used.", PLUGINS),
    "distill.teacher=my_net": ("distill.teacher=my_net is not a run,", PLUGINS),
    "hooks.mine.after=3": ("hooks names mine, but no plug-in is imported: add plugins=[...]",),
    "augment.custom=[rotate]": ("augment.custom names rotate, but no plug-in is imported: add plugins=[...]",),
}


@pytest.mark.parametrize("word", OF_NO_PLUGIN)
def test_a_name_that_a_plug_in_may_register_is_refused_with_a_hint_at_plugins(command, word):
    code, _, err = command(word)
    assert code == 2
    for part in OF_NO_PLUGIN[word]:
        assert part in err


def test_hydra_reads_its_flags_with_the_parser_that_unknown_flags_are_looked_for_with():
    # a private name: if a new Hydra uses another parser for its command line, change explain.hydras_flags
    assert hydra.main.__globals__["get_args_parser"] is explain.get_args_parser
    flags, unknown = explain.hydras_flags(["--help", "-m", "optim.lr=1", "--cfg", "job", "--batch-size", "3"])
    assert (flags.help, flags.multirun, flags.cfg) == (True, True, "job")
    assert "--batch-size" in unknown


def test_every_example_of_the_help_composes(command, capsys):
    examples = re.findall(r"^ +python -m ftexp\.train ?(.*?)\s*(?:#.*)?$", help_text(command, capsys), re.MULTILINE)
    assert len(examples) >= 5
    for example in examples:
        if "hydra/sweeper=tune" in example:  # its trials are composed one by one; see test_search.py
            continue
        words = [word for word in example.split() if word not in ("--cfg", "job")]
        words = [word.replace("scaling=multi_gpu", "scaling=local") for word in words]
        composed = []
        code, _, err = command(*words, task=lambda job, composed=composed: composed.append(to_config(job)))
        assert (code, err) == (0, ""), example
        assert composed


def test_cfg_job_prints_yaml_that_composes_to_the_same_config(command, tmp_path):
    words = ["experiment=smoke", "model.kwargs.depth=2", "scaling=elastic", "run.name=a b"]
    code, out, _ = command(*words, "--cfg", "job")
    assert code == 0
    direct = []
    command(*words, task=lambda job: direct.append(to_config(job)))
    assert to_config(OmegaConf.create(out)) == direct[0]
    assert direct[0].model.kwargs["depth"] == 2


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (None, 0, ""),
        (ConfigError("seed=x is wrong"), 2, "ftexp: seed=x is wrong\n"),
        (RunFailedError("spent"), 1, "ftexp: spent\n"),
        (KeyboardInterrupt(), 130, ""),
        (Terminated(), 75, ""),
    ],
    ids=str,
)
def test_a_training_outside_of_hydra_ends_with_the_commands_exit_codes(raised, code, told, capsys):
    def run():
        if raised is not None:
            raise raised

    assert exit_code_of(run) == code
    assert capsys.readouterr().err == told
