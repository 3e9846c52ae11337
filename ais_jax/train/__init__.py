"""Training. The package itself can be called: `ais_jax.train(config, reward_fn=None)`."""

import sys
import types


class _Train(types.ModuleType):
    """Lets `ais_jax.train` be both this folder and the function that starts a run."""

    def __call__(self, config, reward_fn=None, name="run", resume=True):
        """Trains as `config` says; see `ais_jax.train.run.train`."""
        from ais_jax.train.run import train

        return train(config, reward_fn, name, resume)


sys.modules[__name__].__class__ = _Train
