"""How others answer diverse preferences: one small class a method, all behind one signature."""
