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

# Everyday nouns that `class_presence` compares a class with: things and stuff of all kinds, and no general terms ("animal"),
# which would compete with what they contain. A change moves every presence, so it needs a new calibration.
EVERYDAY_NOUNS = """
man, woman, child, baby, crowd, soldier, police officer, doctor, dancer, athlete, face, hand, hair, eye, leg, foot,
dog, cat, horse, cow, sheep, pig, goat, donkey, camel, elephant, giraffe, zebra, lion, tiger, bear, wolf, fox, deer,
rabbit, squirrel, mouse, monkey, kangaroo, whale, dolphin, seal, bird, eagle, owl, parrot, duck, swan, chicken,
penguin, fish, shark, turtle, frog, snake, lizard, crocodile, butterfly, bee, spider, beetle, crab, snail, octopus,
coral, car, truck, bus, van, train, tram, bicycle, motorcycle, scooter, tractor, ambulance, airplane, helicopter,
rocket, balloon, boat, sailboat, ship, canoe, wheel, engine, traffic light, traffic sign, street lamp, pole,
billboard, bench, fountain, statue, house, skyscraper, church, castle, temple, factory, barn, bridge, tower,
lighthouse, windmill, tent, roof, wall, brick, column, arch, door, gate, window, balcony, staircase, chimney, fence,
railing, road, sidewalk, railroad track, parking lot, tunnel, pier, runway, swimming pool, playground, stadium, stage,
floor, ceiling, carpet, tile, curtain, lamp, chandelier, candle, mirror, picture frame, painting, poster, clock,
table, desk, chair, armchair, sofa, stool, bed, pillow, blanket, mattress, cabinet, drawer, shelf, bookcase, wardrobe,
fireplace, bathtub, shower, toilet, sink, faucet, towel, soap, toothbrush, refrigerator, oven, stove, microwave,
toaster, kettle, washing machine, vacuum cleaner, fan, radiator, plate, bowl, cup, glass, bottle, jar, can, box,
basket, bucket, bag, backpack, suitcase, handbag, wallet, umbrella, fork, knife, spoon, pot, pan, bread, cheese, egg,
meat, sausage, pizza, sandwich, hamburger, soup, salad, rice, pasta, cake, cookie, chocolate, ice cream, coffee, wine,
milk, apple, banana, orange, lemon, grapes, strawberry, pineapple, watermelon, tomato, potato, carrot, onion, cabbage,
pepper, mushroom, corn, pumpkin, nut, shirt, t-shirt, sweater, jacket, coat, suit, dress, skirt, trousers, shorts,
sock, shoe, boot, sandal, hat, cap, helmet, glove, scarf, tie, belt, glasses, ring, necklace, watch, mask, computer,
laptop, keyboard, screen, telephone, television, radio, camera, printer, loudspeaker, headphones, remote control,
cable, battery, book, newspaper, magazine, map, letter, pen, pencil, scissors, tape, key, lock, coin, flag, toy, doll,
teddy bear, ball, bat, racket, kite, skateboard, surfboard, skis, swing, dice, chess board, guitar, piano, violin,
drum, trumpet, hammer, screwdriver, saw, drill, ladder, rope, chain, nail, pipe, wire, shovel, broom, gun, sword, sky,
cloud, sun, moon, star, rainbow, lightning, fog, smoke, fire, rain, snow, ice, water, sea, wave, river, lake,
waterfall, pond, beach, sand, mud, soil, gravel, rock, stone, cliff, mountain, hill, valley, volcano, desert, island,
cave, glacier, forest, tree, palm tree, bush, hedge, leaf, branch, trunk, root, grass, moss, flower, rose, sunflower,
cactus, hay, field, garden, vineyard, wood, metal, plastic, paper, cardboard, leather, fabric, feather, bone,
wheelchair, stroller, trash can, mailbox, cage, nest, web"""

ANCHOR_WORDS = tuple(" ".join(word.split()) for word in EVERYDAY_NOUNS.split(","))

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
