"""
Built-in vocabularies: the class names of common benchmarks, e.g. `candidate_labels="ade20k"`.

Semicolons separate classes, commas names of the same class. Each set is named after its data set; `-spar` marks the names
of SPAR's published evaluation (arXiv 2604.02252) where they differ. The names of MESS are those of its published code.
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


# A name that the published list gives to several classes is left to the class that has no other, or names it first.
ADE20K_847 = """
wall; building, edifice; sky; tree; road, route; floor, flooring; ceiling; bed; sidewalk, pavement; earth, ground;
cabinet; person, individual, someone, somebody, mortal, soul; grass; windowpane, window; car, auto, automobile,
motorcar; mountain, mount; plant, flora, plant life; table; chair; curtain, drape, drapery, mantle, pall; door; sofa,
couch, lounge; sea; painting, picture; water; mirror; house; rug, carpet, carpeting; shelf; armchair; fence, fencing;
field; lamp; rock, stone; seat; river; desk; bathtub, bathing tub, bath, tub; railing, rail; signboard, sign; cushion;
path; work surface; stairs, steps; column, pillar; sink; wardrobe, press; snow; refrigerator, icebox; base, stand;
bridge, span; blind; runway; cliff, drop, drop-off; sand; fireplace, hearth, open fireplace; pillow; screen door;
toilet, commode, crapper, potty; skyscraper; grandstand, covered stand; box; pool table, billiard table, snooker
table; palm, palm tree; double door; coffee table, cocktail table; counter; countertop; chest of drawers, bureau,
dresser; kitchen island; boat; waterfall, falls; stove, kitchen stove, range, kitchen range, cooking stove; flower;
bookcase; controls; book; stairway, staircase; streetlight, street lamp; computer, computing machine, computing
device, data processor, electronic computer, information processing system; bus, autobus, coach, charabanc,
double-decker, jitney, motorbus, motorcoach, omnibus, passenger vehicle; swivel chair; light, light source; bench;
case, display case, showcase, vitrine; towel; fountain; embankment; television receiver, television, television set,
tv, tv set, idiot box, boob tube, telly, goggle box; van; hill; awning, sunshade, sunblind; poster, posting, placard,
notice, bill, card; truck, motortruck; airplane, aeroplane, plane; pole; tower; court; ball; aircraft carrier,
carrier, flattop, attack aircraft carrier; buffet, sideboard; hovel, hut, hutch, shack; apparel, wearing apparel,
dress, clothes; minibike, motorbike; animal, animate being, beast, brute, creature, fauna; chandelier, pendant,
pendent; step, stair; booth, cubicle, kiosk; bicycle, bike, cycle; doorframe, doorcase; sconce; pond; trade name,
brand name, brand, marque; bannister, banister, balustrade, balusters, handrail; bag; traffic light, traffic signal,
stoplight; gazebo; escalator, moving staircase, moving stairway; land, soil; board, plank; arcade machine; eiderdown,
duvet, continental quilt; bar; stall, sales booth; playground; ship; ottoman, pouf, pouffe, puff, hassock; ashcan,
trash can, garbage can, wastebin, ash bin, ashbin, dustbin, trash barrel, trash bin; bottle; cradle;
flowerpot; conveyer belt, conveyor belt, conveyer, conveyor, transporter; train, railroad train; stool; lake; tank,
storage tank; ice, water ice; basket, handbasket; manhole; tent, collapsible shelter; canopy; microwave, microwave
oven; barrel, cask; dirt track; beam; dishwasher, dish washer, dishwashing machine; plate; screen, crt screen; ruins;
washer, automatic washer, washing machine; blanket; plaything, toy; food, solid food; silver screen, projection
screen; oven; stage; beacon, lighthouse, beacon light, pharos; umbrella; sculpture; aqueduct; container; scaffolding,
staging; hood, exhaust hood; curb, curbing, kerb; roller coaster; horse, equus caballus; catwalk; glass, drinking
glass; vase; central reservation; carousel; radiator; closet; machine; wharf, wharfage, dock; fan; inflatable bounce
game; pitch; paper; arcade, colonnade; hot tub; helicopter; tray; partition, divider; vineyard; bowl; bullring; flag;
pot; footbridge, overcrossing, pedestrian bridge; shower; traveling bag, travelling bag, grip, suitcase; bulletin
board; confessional booth; trunk, tree trunk, bole; forest; elevator door; laptop, laptop computer; instrument panel;
bucket, pail; tapestry, tapis; platform; jacket; gate; monitor, monitoring device; telephone booth, phone booth, call
box, telephone box, telephone kiosk; spotlight, spot; ring; control panel; blackboard, chalkboard; air conditioner,
air conditioning; chest; clock; sand dune; pipe, pipage, piping; vault; table football; cannon; swimming pool,
swimming bath, natatorium; fluorescent, fluorescent fixture; statue; loudspeaker, speaker, speaker unit, loudspeaker
system, speaker system; exhibitor; ladder; carport; dam; pulpit; skylight, fanlight; water tower; grille, grillwork;
display board; pane, pane of glass, window glass; rubbish, trash, scrap; ice rink; fruit; patio; vending machine;
telephone, phone, telephone set; net; backpack, back pack, knapsack, packsack, rucksack, haversack; jar; track;
magazine; shutter; roof; banner, streamer; landfill; post; altarpiece, reredos; hat, chapeau; arch, archway; table
game; handbag, pocketbook, purse; document, written document, papers; dome; pier; shanties; forecourt; crane; dog,
domestic dog, canis familiaris; piano, pianoforte, forte-piano; drawing; cabin; ad, advertisement, advertizement,
advertising, advertizing, advert; amphitheater, amphitheatre, coliseum; monument; henhouse; cockpit; heater, warmer;
windmill, aerogenerator, wind generator; pool; elevator, lift; decoration, ornament, ornamentation; labyrinth; text,
textual matter; printer; mezzanine, first balcony; mattress; straw; stalls; terrace; billboard, hoarding; bus stop;
trouser, pant; console table, console; rack; notebook; shrine; pantry; cart; steam shovel; porch; postbox, mailbox,
letter box; figurine, statuette; recycling bin; folding screen; telescope; deck chair, beach chair; kennel; coffee
maker; altar, communion table, lords table; fish; easel; artificial golf green; iceberg; candlestick, candle holder;
shower stall, shower bath; television stand; wall socket, wall plug, electric outlet, electrical outlet, outlet,
electric receptacle; skeleton; grand piano, grand; candy, confect; grille door; pedestal, plinth, footstall; jersey,
t-shirt, tee shirt; shoe; gravestone, headstone, tombstone; shanty; structure; rocking chair, rocker; bird; place mat;
tomb; big top; gas pump, gasoline pump, petrol pump, island dispenser; lockers; cage; finger; bleachers; ferris wheel;
hairdresser chair; mat; stands; aquarium, marine museum; streetcar, tram, tramcar, trolley, trolley car; napkin, table
napkin, serviette; dummy; booklet, folder, leaflet, pamphlet; sand trap; shop, store; table cloth; service station;
coffin; drawer; cages; slot machine, coin machine; balcony; volleyball court; table tennis; control table; shirt;
merchandise, ware, product; railway; parterre; chimney; can, tin, tin can; tanks; fabric, cloth, material, textile;
alga, algae; system; map; greenhouse; mug; barbecue; trailer; toilet tissue, toilet paper, bathroom tissue; organ;
dishrag, dishcloth; island; keyboard; trench; basketball hoop, hoop; steering wheel; pitcher, ewer; goal; bread,
breadstuff, staff of life; beds; wood; file cabinet; newspaper; motorboat; rope; guitar; rubble; scarf; barrels; cap;
leaves; control tower; dashboard; bandstand; lectern; switch, electric switch, electrical switch; baseboard, mopboard;
shower room; smoke; faucet, spigot; bulldozer; saucepan; shops; meter; crevasse; gear; candelabrum, candelabra; sofa
bed; tunnel; pallet; wire, conducting wire; kettle; bidet; baby buggy, baby carriage, perambulator, pram, stroller,
go-cart, pushchair, pusher; music stand; tube; cup; parking meter; ice hockey rink; shelter; weeds; temple; patty,
cake; ski slope; panel; wallet; wheel; towel rack, towel horse; roundabout; canister, cannister; rod; soap dispenser;
bell; canvas; box office, ticket booth; teacup; trellis; workbench; valley, vale; toaster; knife; podium; ramp; tumble
dryer; fireplug, fire hydrant; gym shoe, sneaker, tennis shoe; lab bench; equipment; rocky formation; plastic;
calendar; caravan; check-in-desk; ticket counter; brush; mill; covered bridge; bowling alley; hanger; excavator;
trestle; revolving door; blast furnace; scale, weighing machine; projector; soap; locker; tractor; stretcher; frame;
grating; alembic; candle, taper, wax light; barrier; cardboard; cave; puddle; tarp; price tag; watchtower; meters;
light bulb, lightbulb, bulb, incandescent lamp, electric light, electric-light bulb; tracks; hair dryer; skirt;
viaduct; paper towel; coat; sheet; fire extinguisher, extinguisher, asphyxiator; water wheel; pottery, clayware;
magazine rack; teapot; microphone, mike; support; forklift; canyon; cash register, register; leaf, leafage, foliage;
remote control, remote; soap dish; windshield, windscreen; cat; cue, cue stick, pool cue, pool stick; vent, venthole,
vent-hole, blowhole; videos; shovel; eaves; antenna, aerial, transmitting aerial; shipyard; hen, biddy; traffic cone;
washing machines; truck crane; cds; niche; scoreboard; briefcase; boot; sweater, jumper; hay; pack; bottle rack;
glacier; pergola; building materials; television camera; first floor; rifle; tennis table; stadium; safety belt;
cover; dish rack; synthesizer; pumpkin; gutter; fruit stand; ice floe, floe; handle, handgrip, hold; wheelchair;
mousepad, mouse mat; diploma; fairground ride; radio; hotplate; junk; wheelbarrow; stream; toll plaza; punching bag;
trough; throne; chair desk; weighbridge; extractor fan; hanging clothes; dish, dish aerial, dish antenna, saucer;
alarm clock; ski lift; chain; garage; mechanical shovel; wine rack; tramway; treadmill; menu; block; well; witness
stand; branch; duck; casserole; frying pan; desk organizer; mast; spectacles, specs, glasses; service elevator;
dollhouse; hammock; clothes hanging; photocopier; notepad; golf cart; footpath; cross; baptismal font; boiler; skip;
rotisserie; tables; water mill; helmet; cover curtain; brick; table runner; ashtray; street box; stick; hangers;
cells; urinal; centerpiece; portable fridge; dvds; golf club; skirting board; water cooler; clipboard; camera,
photographic camera; pigeonhole; chips; food processor; post box; lid; drum; blender; cave entrance; dental chair;
obelisk; canoe; mobile; monitors; pool ball; cue rack; baggage carts; shore; fork; paper filer; bicycle rack; coat
rack; garland; sports bag; fish tank; towel dispenser; carriage; brochure; plaque; stringer; iron; spoon; flag pole;
toilet brush; book stand; water faucet, water tap, tap, hydrant; ticket office; broom; dvd; ice bucket; carapace,
shell, cuticle, shield; tureen; folders; chess; root; sewing machine; model; pen; violin; sweatshirt; recycling
materials; mitten; chopping board, cutting board; mask; log; mouse, computer mouse; grill; hole; target; trash bag;
chalk; sticks; balloon; score; hair spray; roll; runner; engine; inflatable glove; games; pallets; baskets; coop; dvd
player; rocking horse; buckets; bread rolls; shawl; watering can; spotlights; post-it; bowls; security camera; runner
cloth; lock; alarm, warning device, alarm system; side; roulette; bone; cutlery; pool balls; wheels; spice rack; plant
pots; towel ring; bread box; video; funfair; breads; tripod; ironing board; skimmer; hollow; scratching post;
tricycle; file box; mountain pass; tombstones; cooker; card game, cards; golf bag; towel paper; chaise lounge; sun;
toilet paper holder; rake; key; umbrella stand; dartboard; transformer; fireplace utensils; sweatshirts; cellular
telephone, cellular phone, cellphone, cell, mobile phone; tallboy; stapler; sauna; test tube; palette; shopping carts;
tools; push button, push, button; star; roof rack; barbed wire; spray; ear; sponge; racket; tins; eyeglasses; file;
scarfs; sugar bowl; flip flop; headstones; laptop bag; leash; climbing frame; suit hanger; floor spotlight; plate
rack; sewer; hard drive; sprinkler; tools box; necklace; bulbs; steel industry; club; jack; door bars; control board;
hairbrush; napkin holder; office; smoke detector; utensils; apron; scissors; terminal; grinder; entry phone; newspaper
stand; pepper shaker; onions; central processing unit, cpu, c p u, central processor, processor, mainframe; tape; bat;
coaster; calculator; potatoes; luggage rack; salt; street number; viewpoint; sword; cd; rowing machine; plug; andiron,
firedog, dog-iron; pepper; tongs; bonfire; dog dish; belt; dumbbells; videocassette recorder, vcr; hook; envelopes;
shower faucet; watch; padlock; swimming pool ladder; spanners; gravy boat; notice board; trash bags; fire alarm;
ladle; stethoscope; rocket; funnel; bowling pins; valve; thermometer; cups; spice jar; night light; soaps; games
table; slotted spoon; reel; scourer; sleeping robe; desk mat; dumbbell; hammer; tie; typewriter; shaker; cheese dish;
sea star; racquet; butane gas cylinder; paper weight; shaving brush; sunglasses; gear shift; towel rail; adding
machine, totalizer, totaliser"""

ATLANTIS = """
bicycle; boat; breakwater; bridge; building; bus; canal; car; cliff; culvert; cypress tree; dam; ditch; fence; fire
hydrant; fjord; flood; glaciers; hot spring; lake; levee; lighthouse; mangrove; marsh; motorcycle; offshore platform;
parking meter; person; pier; pipeline; pole; puddle; rapids; reservoir; river; river delta; road; sea; ship;
shoreline; sidewalk; sky; snow; spillway; swimming pool; terrain; traffic sign; train; truck; umbrella; vegetation;
wall; water tower; water well; waterfall; wetland"""

CUB_200 = """
background; Black-footed Albatross; Laysan Albatross; Sooty Albatross; Groove billed Ani; Crested Auklet; Least
Auklet; Parakeet Auklet; Rhinoceros Auklet; Brewer Blackbird; Red winged Blackbird; Rusty Blackbird; Yellow-headed
Blackbird; Bobolink; Indigo Bunting; Lazuli Bunting; Painted Bunting; Cardinal; Spotted Catbird; Gray Catbird;
Yellow-breasted Chat; Eastern Towhee; Chuck will Widow; Brandt Cormorant; Red-faced Cormorant; Pelagic Cormorant;
Bronzed Cowbird; Shiny Cowbird; Brown Creeper; American Crow; Fish Crow; Black-billed Cuckoo; Mangrove Cuckoo;
Yellow-billed Cuckoo; Gray-crowned Rosy-Finch; Purple Finch; Northern Flicker; Acadian Flycatcher; Great Crested
Flycatcher; Least Flycatcher; Olive-sided Flycatcher; Scissor-tailed Flycatcher; Vermilion Flycatcher; Yellow-bellied
Flycatcher; Frigatebird; Northern Fulmar; Gadwall; American Goldfinch; European Goldfinch; Boat-tailed Grackle; Eared
Grebe; Horned Grebe; Pied-billed Grebe; Western Grebe; Blue Grosbeak; Evening Grosbeak; Pine Grosbeak; Rose-breasted
Grosbeak; Pigeon Guillemot; California Gull; Glaucous-winged Gull; Heermann Gull; Herring Gull; Ivory Gull;
Ring-billed Gull; Slaty-backed Gull; Western Gull; Anna Hummingbird; Ruby-throated Hummingbird; Rufous Hummingbird;
Green Violetear; Long-tailed Jaeger; Pomarine Jaeger; Blue Jay; Florida Jay; Green Jay; Dark-eyed Junco; Tropical
Kingbird; Gray Kingbird; Belted Kingfisher; Green Kingfisher; Pied Kingfisher; Ringed Kingfisher; White-breasted
Kingfisher; Red-legged Kittiwake; Horned Lark; Pacific Loon; Mallard; Western Meadowlark; Hooded Merganser;
Red-breasted Merganser; Mockingbird; Nighthawk; Clark Nutcracker; White-breasted Nuthatch; Baltimore Oriole; Hooded
Oriole; Orchard Oriole; Scott Oriole; Ovenbird; Brown Pelican; White Pelican; Western Wood-Pewee; Sayornis; American
Pipit; Whip-poor-Will; Horned Puffin; Common Raven; White-necked Raven; American Redstart; Geococcyx; Loggerhead
Shrike; Great Grey Shrike; Baird Sparrow; Black-throated Sparrow; Brewer Sparrow; Chipping Sparrow; Clay-colored
Sparrow; House Sparrow; Field Sparrow; Fox Sparrow; Grasshopper Sparrow; Harris Sparrow; Henslow Sparrow; Le Conte
Sparrow; Lincoln Sparrow; Nelson Sharp-tailed Sparrow; Savannah Sparrow; Seaside Sparrow; Song Sparrow; Tree Sparrow;
Vesper Sparrow; White-crowned Sparrow; White-throated Sparrow; Cape Glossy Starling; Bank Swallow; Barn Swallow; Cliff
Swallow; Tree Swallow; Scarlet Tanager; Summer Tanager; Artic Tern; Black Tern; Caspian Tern; Common Tern; Elegant
Tern; Forsters Tern; Least Tern; Green-tailed Towhee; Brown Thrasher; Sage Thrasher; Black-capped Vireo; Blue-headed
Vireo; Philadelphia Vireo; Red-eyed Vireo; Warbling Vireo; White-eyed Vireo; Yellow-throated Vireo; Bay-breasted
Warbler; Black-and-white Warbler; Black-throated Blue Warbler; Blue-winged Warbler; Canada Warbler; Cape May Warbler;
Cerulean Warbler; Chestnut-sided Warbler; Golden-winged Warbler; Hooded Warbler; Kentucky Warbler; Magnolia Warbler;
Mourning Warbler; Myrtle Warbler; Nashville Warbler; Orange-crowned Warbler; Palm Warbler; Pine Warbler; Prairie
Warbler; Prothonotary Warbler; Swainson Warbler; Tennessee Warbler; Wilson Warbler; Worm-eating Warbler; Yellow
Warbler; Northern Waterthrush; Louisiana Waterthrush; Bohemian Waxwing; Cedar Waxwing; American Three-toed Woodpecker;
Pileated Woodpecker; Red-bellied Woodpecker; Red-cockaded Woodpecker; Red-headed Woodpecker; Downy Woodpecker; Bewick
Wren; Cactus Wren; Carolina Wren; House Wren; Marsh Wren; Rock Wren; Winter Wren; Common Yellowthroat"""

FOODSEG103 = """
background; candy; egg tart; french fries; chocolate; biscuit; popcorn; pudding; ice cream; cheese butter; cake; wine;
milkshake; coffee; juice; milk; tea; almond; red beans; cashew; dried cranberries; soy; walnut; peanut; egg; apple;
date; apricot; avocado; banana; strawberry; cherry; blueberry; raspberry; mango; olives; peach; lemon; pear; fig;
pineapple; grape; kiwi; melon; orange; watermelon; steak; pork; chicken duck; sausage; fried meat; lamb; sauce; crab;
fish; shellfish; shrimp; soup; bread; corn; hamburg; pizza; hanamaki baozi; wonton dumplings; pasta; noodles; rice;
pie; tofu; eggplant; potato; garlic; cauliflower; tomato; kelp; seaweed; spring onion; rape; ginger; okra; lettuce;
pumpkin; cucumber; white radish; carrot; asparagus; bamboo shoots; broccoli; celery stick; cilantro mint; snow peas;
cabbage; bean sprouts; onion; pepper; green beans; French beans; king oyster mushroom; shiitake; enoki mushroom;
oyster mushroom; white button mushroom; salad; other ingredients"""

# the sets of MESS (Blumenstiel et al., 2023) whose words are few; the others stand above
MESS: dict[str, str] = {
    "chase-db1": "others; blood vessels",
    "corrosion-cs": "others; steel with fair corrosion; steel with poor corrosion; steel with severe corrosion",
    "cryonuseg": "others; nuclei in cells",
    "cwfid": "ground; crop seedling; weed",
    "deepcrack": "concrete or asphalt; crack",
    "dram": "bird; boat; bottle; cat; chair; cow; dog; horse; person; potted-plant; sheep; background",
    "floodnet": "background; building-flooded; building-non-flooded; road-flooded; road-non-flooded; water; tree; vehicle; "
    "pool; grass",
    "isaid": "others; boat; storage tank; baseball diamond; tennis court; basketball court; running track field; bridge; "
    "truck or bus; car; helicopter; swimming pool; traffic circle; soccer field; air plane; pier",
    "isprs-potsdam": "road; building; grass; tree; car; others",
    "kvasir-instrument": "others; tool",
    "mhp-v1": "others; hat; hair; sunglasses; upper clothes; skirt; pants; dress; belt; left shoe; right shoe; face; left "
    "leg; right leg; left arm; right arm; bag; scarf; torso skin",
    "paxray-bones": "others; bones",
    "paxray-diaphragm": "others; diaphragm",
    "paxray-lungs": "others; lung",
    "paxray-mediastinum": "others; mediastinum",
    "pst900": "background; fire extinguisher; backpack; drill; human",
    "suim": "background (waterbody); human diver; aquatic plants and sea-grass; wrecks and ruins; robots "
    "(auvs/rovs/instruments); reefs and invertebrates; fish and vertebrates; sea-floor and rocks",
    "uavid": "others; building; road; tree; grass; moving car; parked car; humans",
    "worldfloods": "land; water and flood; cloud",
    "zerowaste-f": "background or trash; rigid plastic; cardboard; metal; soft plastic",
}


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
    "ade20k-spar": together(ADE20K),
    "ade20k-847": ADE20K_847,
    "coco-object": f"background;{COCO_THINGS}",
    "coco-stuff": f"{COCO_THINGS};{COCO_STUFF}",
    "loveda": "background; building; road; water; barren; forest; agricultural",
    "atlantis": ATLANTIS,
    "cub-200": CUB_200,
    "dark-zurich": f"unlabeled;{CITYSCAPES}",
    "foodseg103": FOODSEG103,
    **MESS,
}


def vocabulary_lines(name: str) -> list[str]:
    """The classes of a built-in vocabulary, each as a line of names separated by commas."""
    return [" ".join(line.split()) for line in VOCABULARIES[name].split(";")]
