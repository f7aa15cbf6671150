"""The published predictor, built from the `xlstm` package alone: what ours must equal."""

import torch
from torch import nn
from xlstm import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
)
from xlstm.blocks.slstm.cell import sLSTMCell_cuda

POOLS = {
    "mean": lambda x: x.mean(1),
    "last": lambda x: x[:, -1],
    "max": lambda x: x.max(1).values,
    "first_last": lambda x: (x[:, 0] + x[:, -1]) / 2,
}


class Pooler(nn.Module):
    def __init__(self, width: int, blocks: int, context: int):
        super().__init__()
        mlstm = mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=4)
        slstm = sLSTMLayerConfig(
            backend="vanilla", num_heads=4, conv1d_kernel_size=4, bias_init="powerlaw_blockdependent"
        )
        config = xLSTMBlockStackConfig(
            mlstm_block=mLSTMBlockConfig(mlstm=mlstm),
            slstm_block=sLSTMBlockConfig(slstm=slstm, feedforward=FeedForwardConfig(proj_factor=1.3, act_fn="gelu")),
            context_length=context,
            num_blocks=blocks,
            embedding_dim=width,
            slstm_at=[1],
        )
        self.xlstm_stack = xLSTMBlockStack(config)


class Reference(nn.Module):
    """x [batch, tokens, inputs], none padded -> [batch, outputs]."""

    def __init__(self, inputs=20, width=32, blocks=2, hidden=16, outputs=1, pooling="mean", context=512, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.W = nn.Linear(inputs, width)
        self.xlstm_pooler = Pooler(width, blocks, context)
        self.fc = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        self._pool = POOLS[pooling]
        for name, parameter in self.named_parameters():
            # As after training: what starts at zero no longer is, so that everything shows.
            if "_recurrent_kernel_" in name or ("mlstm_cell" in name and "gate.weight" in name):
                nn.init.normal_(parameter, std=0.1 if width < 100 else 0.05)
            elif "norm" in name or "skip" in name or "bias" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        self.eval()

    def forward(self, x):
        return self.fc(self._pool(self.xlstm_pooler.xlstm_stack(self.W(x))))

    def cells(self):
        return {n: m for n, m in self.named_modules() if n.endswith("slstm_cell")}

    def ours(self):
        """Its weights by our names."""
        return {k.replace("xlstm_pooler.xlstm_stack", "stack").replace("W.", "input."): v for k, v in self.weights()}

    def weights(self):
        return [(name, value.detach().clone()) for name, value in self.state_dict().items()]

    def lightning(self, layout="cuda"):
        """The checkpoint as Lightning writes it; the package itself converts to its `cuda` layout."""
        weights = dict(self.weights())
        for name, cell in self.cells().items() if layout == "cuda" else ():
            cuda = sLSTMCell_cuda(cell.config, skip_backend_init=True)
            kernel = cell._recurrent_kernel_int2ext(cell._recurrent_kernel_.data)
            weights[f"{name}._recurrent_kernel_"] = cuda._recurrent_kernel_ext2int(kernel).contiguous()
            weights[f"{name}._bias_"] = cuda._bias_ext2int(cell._bias_int2ext(cell._bias_.data)).contiguous()
        return {
            "epoch": 11,
            "global_step": 6000,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": {f"model.{name}": value for name, value in weights.items()},
            "hyper_parameters": {"model_max_length": 512, "pooler": "mean"},
            "callbacks": {"ModelCheckpoint{'monitor': 'val_SRCC'}": {"best_model_path": "/x", "monitor": "val_SRCC"}},
            "optimizer_states": [],
        }
