"""The errors a user can mend: their message names the file or key, what is wrong, and what to do."""


class UserError(Exception):
    """Bad input or a bad environment; the command line prints the message without a traceback and exits with 1."""


class RecipeError(UserError):
    """A recipe, or a `--set` override of it, that does not describe an experiment; the command line exits with 2."""


class AudioError(UserError):
    """A file that holds no usable audio or log-mel."""


class CorpusError(UserError):
    """A corpus that cannot be used as it is."""


class CheckpointError(UserError):
    """A file that is not a checkpoint, or not one that fits."""


class TrainingError(UserError):
    """A training that cannot go on."""
