from transformers.generation import GenerationMixin
class BagelGenerationMixin(GenerationMixin):
    pass
