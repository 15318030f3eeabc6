"""Building blocks of models. Parameters carry Hugging Face's names; all state is passed in."""
