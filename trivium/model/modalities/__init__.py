"""What a model needs to take pictures and sounds: encoders, projectors, and their rows among the text's."""
