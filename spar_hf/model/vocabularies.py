"""
Built-in vocabularies: the class names of common benchmarks, e.g. `candidate_labels="ade20k"`.

Semicolons separate classes, commas names of the same class. Each set is named after its data set; `-spar` marks the names
of SPAR's published evaluation (arXiv 2604.02252) where they differ.
"""

COCO_THINGS = """
person; bicycle; car; motorcycle; airplane; bus; train; truck; boat; traffic light; fire hydrant; stop sign; parking
meter; bench; bird; cat; dog; horse; sheep; cow; elephant; bear; zebra; giraffe; backpack; umbrella; handbag; tie;
suitcase; frisbee; skis; snowboard; sports ball; kite; baseball bat; baseball glove; skateboard; surfboard; tennis
racket; bottle; wine glass; cup; fork; knife; spoon; bowl; banana; apple; sandwich; orange; broccoli; carrot; hot dog;
pizza; donut; cake; chair; couch; potted plant; bed; dining table; toilet; tv; laptop; mouse; remote; keyboard; cell
phone; microwave; oven; toaster; sink; refrigerator; book; clock; vase; scissors; teddy bear; hair drier; toothbrush"""

COCO_STUFF = """
banner; blanket; branch; bridge; building; bush; cabinet; cage; cardboard; carpet; ceiling; tile ceiling; cloth;
clothes; clouds; counter; cupboard; curtain; desk; dirt; door; fence; marble floor; floor; stone floor; tile floor;
wood floor; flower; fog; food; fruit; furniture; grass; gravel; ground; hill; house; leaves; light; mat; metal;
mirror; moss; mountain; mud; napkin; net; paper; pavement; pillow; plant; plastic; platform; playing field; railing;
railroad; river; road; rock; roof; rug; salad; sand; sea; shelf; sky; skyscraper; snow; solid; stairs; stone; straw;
structure; table; tent; textile; towel; tree; vegetable; brick wall; concrete wall; wall; wall panel; stone wall; tile
wall; wood wall; water; water drops; window blind; window; wood"""

VOC20 = """
aeroplane; bicycle; bird; boat; bottle; bus; car; cat; chair; cow; dining table; dog; horse; motorbike; person; potted
plant; sheep; sofa; train; tv monitor"""

VOC20_SPAR = """
aeroplane; bicycle; bird; ship; bottle; bus; car; cat; chair; cow; table; dog; horse; motorbike; person, person in
shirt, person in jeans, person in dress, person in sweater, person in skirt, person in jacket; pottedplant; sheep;
sofa; train; television monitor, tv monitor, monitor, television, screen"""

VOC_BACKGROUND_SPAR = """
sky, wall, tree, wood, grass, road, sea, river, mountain, sands, desk, bed, building, cloud, lamp, door, window,
wardrobe, ceiling, shelf, curtain, stair, floor, hill, rail, fence"""

# what surrounds things in most images: the background of the published VOC21 evaluation
STUFF_WORDS = tuple(word.strip() for word in VOC_BACKGROUND_SPAR.split(","))

CONTEXT59 = """
aeroplane; bag; bed; bedclothes; bench; bicycle; bird; boat; book; bottle; building; bus; cabinet; car; cat; ceiling;
chair; cloth; computer; cow; cup; curtain; dog; door; fence; floor; flower; food; grass; ground; horse; keyboard;
light; motorbike; mountain; mouse; person; plate; platform; potted plant; road; rock; sheep; shelves; sidewalk; sign;
sky; snow; sofa; table; track; train; tree; truck; tv monitor; wall; water; window; wood"""

CITYSCAPES = """
road; sidewalk; building; wall; fence; pole; traffic light; traffic sign; vegetation; terrain; sky; person; rider;
car; truck; bus; train; motorcycle; bicycle"""

ADE20K = """
wall; building; sky; floor; tree; ceiling; road; bed; windowpane; grass; cabinet; sidewalk; person; earth; door;
table; mountain; plant; curtain; chair; car; water; painting; sofa; shelf; house; sea; mirror; rug; field; armchair;
seat; fence; desk; rock; wardrobe; lamp; bathtub; railing; cushion; base; box; column; signboard; chest of drawers;
counter; sand; sink; skyscraper; fireplace; refrigerator; grandstand; path; stairs; runway; case; pool table; pillow;
screen door; stairway; river; bridge; bookcase; blind; coffee table; toilet; flower; book; hill; bench; countertop;
stove; palm; kitchen island; computer; swivel chair; boat; bar; arcade machine; hovel; bus; towel; light; truck;
tower; chandelier; awning; streetlight; booth; television receiver; airplane; dirt track; apparel; pole; land;
bannister; escalator; ottoman; bottle; buffet; poster; stage; van; ship; fountain; conveyer belt; canopy; washer;
plaything; swimming pool; stool; barrel; basket; waterfall; tent; bag; minibike; cradle; oven; ball; food; step; tank;
trade name; microwave; pot; animal; bicycle; lake; dishwasher; screen; blanket; sculpture; hood; sconce; vase; traffic
light; tray; ashcan; fan; pier; crt screen; plate; monitor; bulletin board; shower; radiator; glass; clock; flag"""


def together(names: str) -> str:
    """Compound names as one word, as the published evaluation has some sets: `potted plant` -> `pottedplant`."""
    return ";".join(name.replace(" ", "") for name in " ".join(names.split()).replace("; ", ";").split(";"))


VOCABULARIES: dict[str, str] = {
    "voc20": VOC20,
    "voc21": f"background;{VOC20}",
    "voc20-spar": VOC20_SPAR,
    "voc21-spar": f"{VOC_BACKGROUND_SPAR};{VOC20_SPAR}",
    "context59": CONTEXT59,
    "context60": f"background;{CONTEXT59}",
    "context59-spar": together(CONTEXT59),
    "context60-spar": f"background;{together(CONTEXT59)}",
    "cityscapes": CITYSCAPES,
    "cityscapes-spar": together(CITYSCAPES),
    "ade20k": ADE20K,
    "coco-object": f"background;{COCO_THINGS}",
    "coco-stuff": f"{COCO_THINGS};{COCO_STUFF}",
}


def vocabulary_lines(name: str) -> list[str]:
    """The classes of a built-in vocabulary, each as a line of names separated by commas."""
    return [" ".join(line.split()) for line in VOCABULARIES[name].split(";")]
