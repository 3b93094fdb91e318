"""How a scorer learns from preferences: model, data, objectives and the judgement of what came out."""
